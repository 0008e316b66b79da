"""Training of multi-branch models: what plain training learns, and what our trainer guards, measures and keeps."""

from __future__ import annotations

import csv
import pickle
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from yolo_helpers import MULTI_BRANCH, built, make_data, model_yaml, noise, tiny_data, tiny_run, train_args  # noqa: F401

from rep_backbones import fuse, verify
from rep_backbones.rules import FoldError, multi_branch
from rep_backbones.yolo import branch_log, trainer
from rep_backbones.yolo.checkpoint import load_precise
from rep_backbones.yolo.guard import merged_layers, refuse_fused
from rep_backbones.yolo.trainer import TRAINERS, KeepsBranches, RepTrainer

WEIGHTS = ("best.pt", "best_deploy.pt", "best_fp32.pt", "last.pt")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state of the model in a checkpoint of Ultralytics, as stored there."""
    content = torch.load(path, weights_only=False)
    return (content.get("ema") or content["model"]).state_dict()


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "branches.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the trainer says in warnings and errors."""
    said: list[str] = []
    stock = {name: getattr(trainer.LOGGER, name) for name in ("warning", "error")}
    for name, log in stock.items():
        monkeypatch.setattr(trainer.LOGGER, name, lambda text, *rest, log=log: (said.append(str(text)), log(text, *rest)))
    yield said


class Scripted(RepTrainer):
    """A trainer whose validations have the fitness of a script, so that the best epoch is known; may stop as if killed."""

    script: tuple[float, ...] = ()
    killed_after: int | None = None

    def validate(self) -> Any:
        metrics, _ = super().validate()
        self.best_fitness = max(self.script[: self.epoch + 1])
        return metrics, self.script[self.epoch]

    def _model_train(self) -> None:
        if self.killed_after is not None and self.epoch > self.killed_after:
            raise KeyboardInterrupt
        super()._model_train()


# ---- plain training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> SimpleNamespace:  # noqa: F811
    """The run of `tiny_run` with the stock trainer: its folder, and the weights that it started from and ended with."""
    folder = tmp_path_factory.mktemp("plain")
    start: dict[str, torch.Tensor] = {}
    end: dict[str, torch.Tensor] = {}
    model = YOLO(str(model_yaml(folder)))
    model.add_callback("on_pretrain_routine_end", lambda run: start.update(deepcopy(run.model.state_dict())))
    model.add_callback("on_train_end", lambda run: end.update(deepcopy(run.model.state_dict())))
    model.train(**train_args(tiny_data, folder))
    return SimpleNamespace(folder=folder / "run", start=start, end=end)


def test_plain_training_trains_every_branch(plain_run: SimpleNamespace) -> None:
    model, _ = load_checkpoint(plain_run.folder / "weights" / "last.pt")
    layers = multi_branch(model)
    assert len(layers) == MULTI_BRANCH["mixed"]
    for path, layer, _ in layers:
        for name, _ in layer.named_parameters(prefix=path):
            assert not torch.equal(plain_run.start[name], plain_run.end[name]), f"{name} has not learned"


def test_plain_training_leaves_no_files_of_the_hook(plain_run: SimpleNamespace) -> None:
    assert sorted(path.name for path in (plain_run.folder / "weights").iterdir()) == ["best.pt", "last.pt"]


def test_trainer_learns_the_same_weights_as_plain_training(plain_run: SimpleNamespace, tiny_run: Path) -> None:  # noqa: F811
    for name in ("best.pt", "last.pt"):
        plain, hooked = weights(plain_run.folder / "weights" / name), weights(tiny_run / "weights" / name)
        assert list(plain) == list(hooked)
        assert [key for key in plain if not torch.equal(plain[key], hooked[key])] == []


# ---- what a run of the trainer leaves ----------------------------------------------------------------------------------


def test_run_has_all_weights_and_no_rest(tiny_run: Path) -> None:  # noqa: F811
    assert sorted(path.name for path in (tiny_run / "weights").iterdir()) == list(WEIGHTS)
    assert not (tiny_run / "branches.png").exists(), "plots=False"


def test_best_fp32_is_best_before_rounding(tiny_run: Path) -> None:  # noqa: F811
    content = torch.load(tiny_run / "weights" / "best_fp32.pt", weights_only=True)
    state, best = content["state_dict"], weights(tiny_run / "weights" / "best.pt")
    assert list(state) == list(best)
    for key, value in best.items():
        assert state[key].dtype == (torch.float32 if value.is_floating_point() else value.dtype), key
        assert torch.equal(state[key].to(value.dtype), value), key
    assert any(not torch.equal(value, value.half().float()) for value in state.values() if value.is_floating_point())
    assert content["epoch"] in (0, 1)
    assert load_precise(tiny_run / "weights" / "best.pt").precise


def test_best_deploy_is_the_fused_fp32_model(tiny_run: Path) -> None:  # noqa: F811
    best = load_precise(tiny_run / "weights" / "best.pt").model
    deploy = YOLO(str(tiny_run / "weights" / "best_deploy.pt")).model.float().eval()
    assert multi_branch(deploy) == []
    assert verify(best, deploy, [noise()]), "each output within its own range"


def test_branches_csv_has_a_row_for_each_validation(tiny_run: Path) -> None:  # noqa: F811
    found = rows(tiny_run)
    assert [row["epoch"] for row in found] == ["1", "2"]
    assert list(found[0])[:3] == ["epoch", "fuse_error", "worst_output"]
    layers = {column.rsplit("/", 1)[0] for column in list(found[0])[3:]}
    assert layers == {"model.1", "model.2.0", "model.2.1", "model.3"}
    for row in found:
        assert 0 < float(row["fuse_error"]) < 1e-5
        for layer in layers:
            own = [float(value) for column, value in row.items() if column.rsplit("/", 1)[0] == layer]
            assert len(own) in (2, 3) and min(own) >= 0 and sum(own) == pytest.approx(1, abs=1e-5)
    assert list(found[0].values())[3:] != list(found[1].values())[3:], "the second row is not of the first epoch's weights"


def test_branches_csv_is_of_the_weights_kept(tiny_run: Path) -> None:  # noqa: F811
    content = torch.load(tiny_run / "weights" / "best_fp32.pt", weights_only=True)
    model = load_precise(tiny_run / "weights" / "best.pt").model
    row = rows(tiny_run)[content["epoch"]]
    for layer, branches in branch_log.shares(model).items():
        for branch, share in branches.items():
            assert float(row[f"{layer}/{branch}"]) == pytest.approx(share, abs=2e-6)


@pytest.mark.parametrize(("script", "best"), [((0.5, 0.2), 0), ((0.1, 0.5), 1), ((0.3, 0.3), 1)])
def test_best_fp32_follows_best(tmp_path: Path, tiny_data: Path, script: tuple[float, ...], best: int) -> None:  # noqa: F811
    cls = type("Scripted", (Scripted,), {"script": script})
    YOLO(str(model_yaml(tmp_path))).train(trainer=cls, **train_args(tiny_data, tmp_path))
    folder = tmp_path / "run" / "weights"
    assert torch.load(folder / "best_fp32.pt", weights_only=True)["epoch"] == best
    assert load_precise(folder / "best.pt").precise


def test_resumed_run_continues(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    """Killed after the first epoch, which stays the best; then killed in the middle of an epoch that had been validated."""
    first = type("Scripted", (Scripted,), {"script": (0.5, 0.2, 0.1), "killed_after": 0})
    with pytest.raises(KeyboardInterrupt):
        YOLO(str(model_yaml(tmp_path))).train(trainer=first, **train_args(tiny_data, tmp_path, epochs=3))
    run = tmp_path / "run"
    before, kept = rows(run), (run / "weights" / "best_fp32.pt").read_bytes()
    assert [row["epoch"] for row in before] == ["1"]
    branch_log.BranchLog(run, resume=True).write(2, branch_log.Measurement(1.0, "", {}))

    second = type("Scripted", (Scripted,), {"script": (0.5, 0.2, 0.1)})
    YOLO(str(run / "weights" / "last.pt")).train(trainer=second, resume=True)
    after = rows(run)
    assert [row["epoch"] for row in after] == ["1", "2", "3"] and after[0] == before[0]
    assert all(float(row["fuse_error"]) < 1e-5 for row in after)
    assert (run / "weights" / "best_fp32.pt").read_bytes() == kept
    assert load_precise(run / "weights" / "best.pt").precise and (run / "weights" / "best_deploy.pt").exists()


def test_new_run_in_the_same_folder_starts_the_log_anew(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "branches.csv").write_text("epoch,fuse_error,worst_output,old/kxk\n1,0.5,old,1\n")
    YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1"] and "old/kxk" not in rows(tmp_path / "run")[0]


@pytest.mark.parametrize("task", sorted(TRAINERS))
def test_trainers_can_be_sent_to_workers(task: str) -> None:
    assert pickle.loads(pickle.dumps(TRAINERS[task])) is TRAINERS[task]
    assert issubclass(TRAINERS[task], BaseTrainer)


def test_model_without_branches_is_trained_without_a_log(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    YOLO(str(model_yaml(tmp_path, "Conv"))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["args.yaml", "results.csv", "weights"]
    assert not (tmp_path / "run" / "weights" / "best_deploy.pt").exists()


# ---- fused weights are refused -----------------------------------------------------------------------------------------


def fused_in_place(best: Path) -> YOLO:
    model = YOLO(str(best))
    model.fuse()
    return model


@pytest.mark.parametrize("hook", [RepTrainer, None], ids=["RepTrainer", "plain"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda run, folder: YOLO(str(run / "weights" / "best_deploy.pt")), {}),
        (lambda run, folder: fused_in_place(run / "weights" / "best.pt"), {}),
        (lambda run, folder: YOLO(str(model_yaml(folder))).load(str(run / "weights" / "best_deploy.pt")), {}),
        (lambda run, folder: YOLO(str(model_yaml(folder))), {"pretrained": "best_deploy.pt"}),
    ],
    ids=["best_deploy.pt", "fused in place", "load()", "pretrained="],
)
def test_fused_weights_are_refused(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    tiny_run: Path,  # noqa: F811
    model: Callable[[Path, Path], YOLO],
    options: dict[str, str],
    hook: type[RepTrainer] | None,
) -> None:
    """By plain training as well: the guard is in the model's own load()."""
    options = {key: str(tiny_run / "weights" / name) for key, name in options.items()}
    with pytest.raises(ValueError, match="fused model") as caught:
        model(tiny_run, tmp_path).train(trainer=hook, **train_args(tiny_data, tmp_path, epochs=1, **options))
    message = str(caught.value)
    for layer in ("model.1 (RepVGGBlock)", "model.2.0 (RepConv)", "model.2.1 (RepConv)", "model.3 (RepVGGBlock)"):
        assert layer in message
    assert "Start from best.pt (not best_deploy.pt)" in message
    assert not (tmp_path / "run" / "weights" / "last.pt").exists()


def test_fused_model_given_to_the_trainer_is_refused(tmp_path: Path, tiny_data: Path, tiny_run: Path) -> None:  # noqa: F811
    """As a worker gets it, without a checkpoint: the YAML alone says that there were branches."""
    run = RepTrainer(overrides={"model": str(model_yaml(tmp_path)), **train_args(tiny_data, tmp_path)})
    run.model = YOLO(str(tiny_run / "weights" / "best_deploy.pt")).model
    with pytest.raises(ValueError, match=r"4 layers.*model\.1 \(RepVGGBlock\)"):
        run.train()


def test_whole_models_and_other_models_weights_are_not_refused(tmp_path: Path) -> None:
    model, same, stock = built(tmp_path), built(tmp_path), built(tmp_path, "Conv")
    for given in (model, same, stock):
        refuse_fused(model, given)
    refuse_fused(stock, model)
    assert merged_layers(model, fuse(model)) != []


@pytest.mark.parametrize(
    ("layer", "merged"),
    [
        (nn.Conv2d(16, 16, 3), True),
        (nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()), True),
        (nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), False),
        (nn.Conv2d(16, 16, 3, bias=False), False),
        (nn.Identity(), False),
    ],
    ids=["conv", "conv and activation", "conv with bias and norm", "conv without bias", "no conv"],
)
def test_merged_is_a_convolution_with_bias_and_without_norm(tmp_path: Path, layer: nn.Module, merged: bool) -> None:
    model, given = built(tmp_path), built(tmp_path)
    given.model[1] = layer
    assert merged_layers(model, given) == (["model.1 (RepVGGBlock)"] if merged else [])


def test_fused_stock_models_are_left_to_ultralytics(tmp_path: Path) -> None:
    stock = built(tmp_path, "Conv")
    fused = deepcopy(stock).fuse(verbose=False)
    assert merged_layers(stock, fused) == []
    refuse_fused(stock, fused)


def test_weights_of_a_fused_stock_model_are_refused_for_branches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 layers .* model\.1 \(RepVGGBlock\)"):
        refuse_fused(built(tmp_path), built(tmp_path, "Conv").fuse(verbose=False))


# ---- when something goes wrong -----------------------------------------------------------------------------------------


def test_failing_log_does_not_stop_the_training(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(branch_log, "measure", broken)
    YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path))
    about = [text for text in told if "branches.csv" in text]
    assert len(about) == 1 and "No space left on device" in about[0] and "epoch 1" in about[0]
    assert (tmp_path / "run" / "weights" / "best_deploy.pt").exists()


def test_log_that_draws_random_numbers_changes_nothing(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    plain_run: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = branch_log.measure

    def measure(model: nn.Module, images: torch.Tensor) -> branch_log.Measurement:
        random.random(), np.random.rand(), torch.rand(1)
        return stock(model, images)

    monkeypatch.setattr(branch_log, "measure", measure)
    YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path))
    plain, hooked = (weights(run / "weights" / "last.pt") for run in (plain_run.folder, tmp_path / "run"))
    assert [key for key in plain if not torch.equal(plain[key], hooked[key])] == []


def test_weights_that_are_not_finite_are_told(tmp_path: Path, tiny_data: Path, told: list[str]) -> None:  # noqa: F811
    def poison(run: Any) -> None:
        with torch.no_grad():
            next(run.ema.ema.model[3].parameters()).fill_(float("nan"))

    model = YOLO(str(model_yaml(tmp_path)))
    model.add_callback("on_train_epoch_end", poison)
    model.train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    assert any("epoch 1" in text and "NaN" in text and "model.3." in text for text in told)


def test_best_that_cannot_be_fused_is_told_at_the_end(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a diverged training ends on Ultralytics 8.3, which stores NaN as it is."""

    def final_eval(run: BaseTrainer) -> None:
        raise FoldError("weights are NaN", "model.1")

    monkeypatch.setattr(BaseTrainer, "final_eval", final_eval)
    ended: list[bool] = []
    model = YOLO(str(model_yaml(tmp_path)))
    model.add_callback("on_train_end", lambda run: ended.append(True))
    model.train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    assert ended and any("was not validated" in text and "weights are NaN" in text for text in told)


def test_deploy_of_weights_that_are_not_finite_is_told(tmp_path: Path, tiny_run: Path, told: list[str]) -> None:  # noqa: F811
    content = torch.load(tiny_run / "weights" / "best.pt", weights_only=False)
    with torch.no_grad():
        next(content["model"].model[3].parameters()).fill_(float("inf"))
    torch.save(content, tmp_path / "best.pt")
    run = SimpleNamespace(best=tmp_path / "best.pt", wdir=tmp_path)
    KeepsBranches._save_deploy(run)
    (text,) = told
    assert all(part in text for part in ("best_deploy.pt was not written", "NaN or infinite", "fuse_export.py"))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_validation_cannot_round_the_ema() -> None:
    """As Ultralytics 8.3 does with AMP: half() and float() of what it validates, in place."""

    class Rounds:
        def validate(self) -> tuple[dict[str, float], float]:
            self.ema.ema.half().float()
            return {}, 0.5

    class Run(KeepsBranches, Rounds):
        def _log_branches(self) -> None:
            assert torch.equal(self.ema.ema.weight, weight)

    model = nn.Conv2d(3, 3, 3)
    weight = model.weight.detach().clone()
    run = object.__new__(Run)
    run.ema = SimpleNamespace(ema=model)
    assert run.validate() == ({}, 0.5)
    assert run.ema.ema is model and torch.equal(model.weight, weight)


def test_training_under_autocast(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Ultralytics has AMP on GPUs only; here its autocast is the CPU's, in bfloat16."""
    monkeypatch.setattr(engine_trainer, "autocast", lambda *args, **kwargs: torch.autocast("cpu", torch.bfloat16))
    seen: set[torch.dtype] = set()
    model = YOLO(str(model_yaml(tmp_path)))

    def watch(run: Any) -> None:
        for _, layer, _ in multi_branch(run.model):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))

    model.add_callback("on_train_start", watch)
    model.train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    assert seen == {torch.bfloat16}
    (row,) = rows(tmp_path / "run")
    assert float(row["fuse_error"]) < 1e-5
    assert load_precise(tmp_path / "run" / "weights" / "best.pt").precise


def test_state_has_no_names_of_compiled_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"model": nn.Sequential(torch.compile(nn.Conv2d(1, 1, 1)))})
    assert list(model.state_dict()) == ["model.0._orig_mod.weight", "model.0._orig_mod.bias"]
    run = object.__new__(RepTrainer)
    run.ema, run.epoch, run.fitness, run.wdir = SimpleNamespace(ema=model), 3, None, tmp_path
    run._save_float32()
    content = torch.load(tmp_path / "best_fp32.pt", weights_only=True)
    assert list(content["state_dict"]) == ["model.0.weight", "model.0.bias"] and content["epoch"] == 3


def test_tensorboard_gets_the_row(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from ultralytics.utils.callbacks import tensorboard

    seen: dict[tuple[str, int], float] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: seen.update({(name, step): value}))
    monkeypatch.setattr(tensorboard, "WRITER", writer, raising=False)
    YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1))
    (row,) = rows(tmp_path / "run")
    shares = {column for column in row if "/" in column}
    assert {name for name, _ in seen} == {"branches/fuse_error", *(f"branches/{column}" for column in shares)}
    assert seen["branches/model.1/kxk", 1] == pytest.approx(float(row["model.1/kxk"]), abs=1e-5)

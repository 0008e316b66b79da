"""The form of the branches in YAMLs, in trainings, their checkpoints and exports, and in `rep-yolo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML
from yolo_helpers import model_yaml, noise, randomize_norms, tiny_data, tiny_run, train_args  # noqa: F401

import rep_backbones
from rep_backbones.gradient_form import BUFFERS, masked, to_gradient
from rep_backbones.online import Online
from rep_backbones.registry import LAYERS, Layer
from rep_backbones.rep_optimizers import RepAdamW, RepSGD
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import checkpoint, training_form
from rep_backbones.yolo.cli import main
from rep_backbones.yolo.fuse_export_cli import main as fuse_export
from rep_backbones.yolo.trainer import RepTrainer

HEAD = "[[2, 3], 1, Detect, [nc]]"
ROWS = """
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepVGGBlock, [16, 3, 2{first}]]
  - [-1, 2, RepConv, [32, 3, 2{second}]]
  - [-1, 1, RepVGGBlock, [32, 3, 2]]"""
STOCK = ROWS.replace("2, RepConv", "1, RepConv").replace("RepVGGBlock", "Conv").replace("RepConv", "Conv")
QUIET = ["imgsz=64", "plots=False", "verbose=False", "workers=0", "exist_ok=True", "device=cpu", "batch=4", "nbs=4"]


def written(folder: Path, first: str = "", second: str = "", top: str = "", rows: str = ROWS) -> str:
    """A model YAML with keywords in its first and second row, and a line at its top."""
    file = folder / "forms.yaml"
    file.write_text(f"nc: 3\n{top}\nbackbone:{rows.format(first=first, second=second)}\nhead:\n  - {HEAD}\n")
    return str(file)


def built(folder: Path, **text: str) -> nn.Module:
    return DetectionModel(written(folder, **text), verbose=False)


def forms(model: Any) -> str:
    """A letter for each of the rows 1 to 3: branches, online or gradient."""
    layers = list(model.model)[1:4]
    found = [
        "o" if any(isinstance(m, Online) for m in layer.modules()) else "g" if any(masked(layer)) else "b"
        for layer in layers
    ]
    return "".join(found)


# ---- YAMLs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "top", "expected"),
    [
        ("", "", "", "bbb"),
        (", {mode: online}", "", "", "obb"),
        ("", ", {mode: gradient, act: ReLU}", "", "bgb"),
        ("", "", "mode: online", "ooo"),
        (", {mode: branches}", ", {mode: gradient}", "mode: online", "bgo"),
        ("", "", "mode: gradient", "ggg"),
    ],
)
def test_rows_and_models_say_their_form(tmp_path: Path, first: str, second: str, top: str, expected: str) -> None:
    model = built(tmp_path, first=first, second=second, top=top)
    assert forms(model) == expected
    assert [len(layer) for layer in model.model if type(layer) is nn.Sequential] == [2], "repeats"  # type: ignore[arg-type, union-attr]
    assert all(layer.np == sum(p.numel() for p in layer.parameters()) for layer in list(model.model)[1:4])  # type: ignore[arg-type, union-attr]
    model = randomize_norms(model).eval()
    before = model(noise())[0]
    fused = model.fuse(verbose=False)  # type: ignore[operator]
    assert fused.is_fused() and not multi_branch(fused) and not list(masked(fused))
    torch.testing.assert_close(fused(noise())[0], before, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"first": ", {mode: onlin}"}, r"row 1 .*mode='onlin' is unknown; accepted are branches, online, gradient"),
        ({"first": ", {mode: [1]}"}, r"row 1 .*mode=\(1,\) is unknown"),
        ({"top": "mode: fast"}, r"model YAML: mode='fast' is unknown; accepted are branches, online, gradient"),
        (
            {"rows": ROWS.replace("RepConv, [32, 3, 2{second}]", "ConvBNAct, [32, 3, 2, {{mode: online}}]")},
            r"row 2 .*ConvBNAct cannot be made .*ConvBNAct has no branches that fold",
        ),
        (
            {"rows": ROWS.replace("RepConv", "DiverseBranchBlock"), "top": "mode: gradient"},
            r"row 2 .*DiverseBranchBlock cannot be made .*has no gradient form: .*1x1_kxk.*train it online",
        ),
        (
            {"rows": STOCK, "top": "mode: online"},
            r"mode: online: no row has branches",
        ),
    ],
)
def test_a_form_that_cannot_be_is_refused(tmp_path: Path, text: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **text)


@pytest.mark.parametrize(("request_", "expected"), [("", "ooo"), (", mode: gradient", "ggg"), (", mode: branches", "bbb")])
def test_an_expansion_has_the_models_form_or_its_own(tmp_path: Path, request_: str, expected: str) -> None:
    rows = STOCK.replace("  - [-1, 1, Conv, [16, 3, 2]]", "  - [-1, 1, RepVGGBlock, [16, 3, 2]]", 1)
    top = f"mode: online\nexpand: {{block: RepVGGBlock, layers: ['model.1', 'model.2', 'model.3']{request_}}}"
    model = built(tmp_path, rows=rows, top=top)
    assert forms(model) == expected and isinstance(model.get_submodule("model.0.branches.sum"), Online)
    plain = DetectionModel(written(tmp_path, rows=rows, top="mode: online"), verbose=False)
    randomize_norms(plain)
    model.load(plain)  # type: ignore[operator]
    assert forms(model) == expected
    torch.testing.assert_close(model.eval()(noise())[0], plain.eval()(noise())[0])
    torch.testing.assert_close(model.train()(noise())["boxes"], plain.train()(noise())["boxes"], rtol=1e-4, atol=1e-4)


def test_stock_layers_in_the_gradient_form_lose_their_masks_when_fused(tmp_path: Path) -> None:
    model = built(tmp_path, rows=STOCK, top="expand: {block: RepVGGBlock, mode: gradient}").eval()
    assert list(masked(model)) and not model.is_fused() and not multi_branch(model)  # type: ignore[operator]
    before = model(noise())[0]
    fused = model.fuse(verbose=False)  # type: ignore[operator]
    assert fused.is_fused() and not list(masked(fused))
    torch.testing.assert_close(fused(noise())[0], before, rtol=1e-4, atol=1e-3)


def test_plain_weights_go_into_expansions_of_two_forms(tmp_path: Path) -> None:
    both = "[{block: ACBlock, layers: model.1}, {block: RepVGGBlock, layers: model.2, mode: gradient}]"
    model = built(tmp_path, rows=STOCK, top=f"expand: {both}")
    plain = randomize_norms(built(tmp_path, rows=STOCK))
    model.load(plain)  # type: ignore[operator]
    assert forms(model) == "bgb" and len(multi_branch(model)) == 1
    torch.testing.assert_close(model.eval()(noise())[0], plain.eval()(noise())[0])


def test_a_layer_with_a_mode_of_its_own_keeps_the_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Conv2d):
        def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, mode: str = "zeros") -> None:
            super().__init__(c1, c2, k, s, k // 2, padding_mode=mode)

    monkeypatch.setitem(LAYERS, "Own", Layer(Own, "Own", "stage"))
    rows = ROWS.replace("RepConv, [32, 3, 2{second}]", "Own, [32, 3, 2, {{mode: reflect}}]").replace("[-1, 2,", "[-1, 1,")
    assert built(tmp_path, rows=rows).get_submodule("model.2").padding_mode == "reflect"


def test_python_notes_the_form_in_the_models_yaml(tmp_path: Path) -> None:
    model = YOLO(written(tmp_path))
    online = rep_backbones.to_online(model)
    assert forms(online.model) == "ooo" and online.model.yaml["mode"] == "online" and forms(model.model) == "bbb"  # type: ignore[union-attr, arg-type]
    again = DetectionModel(online.model.yaml, verbose=False)  # type: ignore[union-attr, arg-type]
    assert again.state_dict().keys() == online.model.state_dict().keys()  # type: ignore[union-attr]
    plain = rep_backbones.to_gradient(model, scales=online)
    assert forms(plain.model) == "ggg" and plain.model.yaml["mode"] == "gradient"  # type: ignore[union-attr, arg-type]
    conv = YOLO(written(tmp_path, rows=STOCK))
    grown = rep_backbones.expand(conv, "RepVGGBlock", layers="model.2", mode="online")
    assert grown.model.yaml["expand"][0]["mode"] == "online"  # type: ignore[union-attr, index, call-overload]
    assert forms(grown.model) == forms(DetectionModel(grown.model.yaml, verbose=False)) == "bob"  # type: ignore[union-attr, arg-type]


# ---- trainings -----------------------------------------------------------------------------------------------------------


def run(folder: Path, data: Path, model: str | Path | None = None, **keys: Any) -> Any:
    """The trainer of a finished run."""
    yolo = YOLO(str(model or model_yaml(folder)))
    yolo.train(trainer=RepTrainer, **train_args(data, folder, **keys))
    return yolo.trainer


@pytest.fixture(scope="module")
def online_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:  # noqa: F811
    """Folder of a finished run of branches=online, by the command line."""
    folder = tmp_path_factory.mktemp("online")
    command = ["train", f"model={model_yaml(folder)}", f"data={tiny_data}", "epochs=2", "branches=online", "lr0=0.1", *QUIET]
    assert main([*command, "optimizer=SGD", "warmup_epochs=0", f"project={folder}", "name=run"]) == 0
    return folder / "run"


def test_an_online_training_ends_in_proved_files(online_run: Path) -> None:
    weights = online_run / "weights"
    assert YAML.load(online_run / "args.yaml")["branches"] == "online"
    best = checkpoint.load_precise(weights / "best.pt")
    assert best.yaml["mode"] == "online" and best.precise and forms(best.model) == "ooo"
    assert fuse_export([str(weights / "best.pt"), "--imgsz", "64", "--no-latency"]) == 0
    deployed = checkpoint.load(weights / "best_deploy.pt", trust=True).model
    assert not multi_branch(deployed)
    torch.testing.assert_close(deployed(noise())[0], best.model(noise())[0], rtol=1e-4, atol=1e-3)


def test_rep_sgd_takes_the_scales_of_a_search(tmp_path: Path, tiny_data: Path, online_run: Path) -> None:  # noqa: F811
    search = online_run / "weights" / "best.pt"
    trainer = run(tmp_path, tiny_data, optimizer="RepSGD", scales=str(search), epochs=1, weight_decay=0.01)
    assert type(trainer.optimizer) is RepSGD and trainer.args.optimizer == "RepSGD" and forms(trainer.model) == "ggg"
    learned = checkpoint.load_precise(search).model
    expected = {path: masks for path, _, masks in masked(to_gradient(learned))}
    found = {path: masks for path, _, masks in masked(trainer.model)}
    assert expected.keys() == found.keys() and len(found) == 4
    fresh = {path: masks for path, _, masks in masked(DetectionModel({**learned.yaml, "mode": "gradient"}, verbose=False))}  # type: ignore[dict-item]
    for path in found:
        torch.testing.assert_close(found[path].squares, expected[path].squares)
        assert not torch.allclose(found[path].squares, fresh[path].squares, rtol=1e-6)
    kernels = {id(conv.weight) for _, conv, _ in masked(trainer.model)}
    decays = {g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"] if id(p) in kernels}
    assert [*decays] == pytest.approx([0.01])
    best = checkpoint.load_precise(trainer.best)
    assert best.precise and len(list(masked(best.model))) == 4
    deployed = checkpoint.load(trainer.wdir / "best_deploy.pt", trust=True).model
    assert not [name for name in deployed.state_dict() if name.rpartition(".")[2] in BUFFERS]
    torch.testing.assert_close(deployed(noise())[0], best.model(noise())[0], rtol=1e-4, atol=1e-3)
    assert fuse_export([str(trainer.best), "--imgsz", "64", "--no-latency", "--out", str(tmp_path / "out")]) == 0


def test_a_run_of_rep_adamw_is_resumed(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    class Killed(RepTrainer):
        def save_model(self) -> Any:
            saved = super().save_model()
            if self.epoch == 0:
                raise KeyboardInterrupt
            return saved

    keys = train_args(tiny_data, tmp_path, epochs=2, optimizer="repadamw", lr0=0.001)
    with pytest.raises(KeyboardInterrupt):
        YOLO(str(model_yaml(tmp_path))).train(trainer=Killed, **keys)
    model = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    model.train(trainer=RepTrainer, resume=True, project=str(tmp_path), exist_ok=True)
    assert type(model.trainer.optimizer) is RepAdamW and forms(model.trainer.model) == "ggg"
    assert model.trainer.epoch == 1
    squares = next(masked(model.trainer.model))[2].squares
    torch.testing.assert_close(squares.amax(), torch.tensor(2.0), rtol=1e-3, atol=0), "two branches of scale 1"


def test_an_expanded_training_is_online_with_its_pretrained_weights(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    plain = run(tmp_path, tiny_data, model_yaml(tmp_path, "Conv"), epochs=1, name="plain")
    command = [
        "train",
        f"model={plain.best}",
        f"data={tiny_data}",
        "epochs=1",
        "expand=RepVGGBlock",
        "branches=online",
        "lr0=0",
    ]
    assert main([*command, *QUIET, "optimizer=SGD", "warmup_epochs=0", f"project={tmp_path}", "name=grown"]) == 0
    grown = checkpoint.load(tmp_path / "grown" / "weights" / "best.pt").model
    assert "o" in forms(grown)
    kernels = {name: value for name, value in grown.state_dict().items() if name.endswith("kxk.conv.weight")}
    old = checkpoint.load(plain.best).model.state_dict()
    assert len(kernels) > 3
    name = next(name for name in kernels if name.startswith("model.1."))
    torch.testing.assert_close(kernels[name], old["model.1.conv.weight"], rtol=1e-3, atol=1e-4)


def test_trained_branches_go_on_online(tiny_run: Path, tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    best = tiny_run / "weights" / "best.pt"
    trainer = run(tmp_path, tiny_data, best, branches="online", epochs=1, lr0=0.0)
    assert forms(trainer.model) == "ooo"
    before = checkpoint.load(best).model.state_dict()["model.1.branches.kxk.conv.weight"]
    after = trainer.model.state_dict()["model.1.branches.sum.branches.kxk.conv.weight"]
    torch.testing.assert_close(after.cpu(), before)


def test_weights_of_another_form_are_refused(tmp_path: Path, online_run: Path, tiny_run: Path) -> None:  # noqa: F811
    online = checkpoint.load(online_run / "weights" / "best.pt").model
    model = DetectionModel(str(model_yaml(tmp_path)), verbose=False)
    with pytest.raises(ValueError, match="another training form: model.1 and 3 more.*branches="):
        model.load(online)
    plain = training_form.to_gradient(model)
    with pytest.raises(ValueError, match="another training form: model.1"):
        plain.load(checkpoint.load(tiny_run / "weights" / "best.pt").model)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("keys", "top", "message"),
    [
        ({"branches": "fast"}, "", "branches='fast' is unknown; accepted are online, gradient"),
        ({"scales": 3}, "", "scales=3 is not accepted; give a checkpoint"),
        ({"branches": "online", "optimizer": "RepSGD"}, "", "branches=online and optimizer=RepSGD exclude each other"),
        ({"scales": "best.pt"}, "", "scales= is for optimizer=RepSGD or RepAdamW, not for SGD"),
        ({"branches": "online"}, "mode: gradient", "YAML has mode: gradient, and online is asked for"),
        (
            {},
            "mode: gradient",
            "optimizer=SGD would train model.1.branches.sum as a plain layer.*optimizer=RepSGD or RepAdamW",
        ),
        ({"optimizer": "RepSGD", "scales": "nothing.pt"}, "", "nothing.pt does not exist"),
    ],
)
def test_keys_that_exclude_each_other(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    keys: dict[str, Any],
    top: str,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny_data, written(tmp_path, top=top), **keys)


def test_rep_yolo_refuses_in_one_line(tmp_path: Path, tiny_data: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    command = ["train", f"model={written(tmp_path)}", f"data={tiny_data}", "branches=fast", *QUIET, f"project={tmp_path}"]
    assert main(command) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rep-yolo: branches='fast' is unknown")

"""Recipes by name, and the keys of a training that are ours: in the optimizer, in args.yaml, and on resuming."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.model import Model
from ultralytics.utils import YAML
from yolo_helpers import NAMES, model_yaml, tiny_data, train_args  # noqa: F401

from rep_backbones.containers import Scale
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import recipes, training_keys
from rep_backbones.yolo.cli import main
from rep_backbones.yolo.names import find
from rep_backbones.yolo.trainer import RepTrainer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "cfg" / "recipes").glob("*.yaml"))
# a model of each recipe's family as the family's own YAML names it, and what is given beside it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "efficientrep-l": ("efficientrep-m.yaml", {}),
    "efficientrep-n": ("efficientrep-n.yaml", {}),
    "efficientrep-s": ("efficientrep-s.yaml", {}),
    "mobileone": ("mobileone-s0.yaml", {}),
    "qarepvgg": ("efficientrep-qa-n.yaml", {}),
    "repvgg": ("plain34-repvgg-n.yaml", {}),
    "yolo11-expand": ("yolo11n.yaml", {"expand": "RepVGGBlock"}),
    "yolo26-expand": ("yolo26n.yaml", {"expand": "RepVGGBlock"}),
    "yolov7": ("yolov7.yaml", {}),
    "yolov7-tiny": ("yolov7-tiny.yaml", {}),
}
MUON = tuple(map(int, ultralytics.__version__.split(".")[:2])) >= (8, 4)
QUIET = ["imgsz=64", "plots=False", "verbose=False", "workers=0", "exist_ok=True", "device=cpu"]

# a stem of the kind that has scales: a weighted residual in front, whose alpha and beta must not decay
SCALED = """
nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepVGGBlock, [16, 3, 2]]
  - [-1, 1, WeightedResidualBlock, [16, 3, 2]]
  - [-1, 1, OREPABlock, [16, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc]]
"""


class Looking(RepTrainer):
    """Keeps the optimizer's groups as they are when an epoch starts; may stop at the first."""

    seen: list[list[dict[str, Any]]] = []
    stops = False

    def _model_train(self) -> None:
        super()._model_train()
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.seen.append(
            [{**group, "params": {names[id(p)] for p in group["params"]}} for group in self.optimizer.param_groups]
        )
        if self.stops:
            raise KeyboardInterrupt


def looked(folder: Path, data: Path, stops: bool = False, **keys: Any) -> SimpleNamespace:
    """A run of `keys`: the groups of the optimizer in each epoch, its trainer and its folder."""
    (folder / "scaled.yaml").write_text(SCALED)
    cls = type("Looking", (Looking,), {"seen": [], "stops": stops})
    model = YOLO(str(folder / "scaled.yaml"))
    with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
        model.train(trainer=cls, **train_args(data, folder, **keys))
    return SimpleNamespace(groups=cls.seen, trainer=model.trainer, folder=folder / "run")


# ---- the optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "decay"),
    [
        ("SGD", "plain"),
        ("SGD", "equivalent"),
        ("AdamW", "plain"),
        pytest.param("MuSGD", "plain", marks=[] if MUON else pytest.mark.skip),
    ],
)
def test_what_decays(tmp_path: Path, tiny_data: Path, optimizer: str, decay: str) -> None:  # noqa: F811
    run = looked(tmp_path, tiny_data, stops=True, optimizer=optimizer, decay=decay)
    groups, model = run.groups[0], run.trainer.model
    own = {name: group for group in groups for name in group["params"]}
    assert set(own) == {name for name, _ in model.named_parameters()} and sum(len(g["params"]) for g in groups) == len(own)
    spared = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (Scale, nn.BatchNorm2d))
        for name, _ in module.named_parameters(recurse=False)
    }
    assert sum(name.endswith(".alpha") for name in spared) == 2 + 6, "the weighted residual's, and OREPA's branches'"
    assert not [name for name in spared if own[name]["weight_decay"]]
    assert not [name for name in spared if own[name].get("use_muon")]
    assert not [name for name in own if name.endswith(".bias") and own[name]["weight_decay"]]
    kernels = {f"{path}.{n}" for path, _, part in multi_branch(model) for n, p in named(part, model, path) if p.dim() > 1}
    assert kernels <= set(own) and len(kernels) == 10
    for name in set(own) - spared:
        if not name.endswith(".bias") and "dfl" not in name:
            expected = 0.0 if decay == "equivalent" and name in kernels else 0.0005
            assert own[name]["weight_decay"] == pytest.approx(expected), name
    # by the label "weight" Ultralytics finds the groups that it gives a decay again when memory was short
    assert {own[name]["param_group"] for name in spared if name.endswith(".alpha")} == {"spared"}
    assert decay == "plain" or {own[name]["param_group"] for name in kernels} == {"equivalent"}


def named(part: nn.Module, model: nn.Module, path: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a multi-branch part by their names within the layer at `path`."""
    inside = {id(p) for p in part.parameters()}
    return [(name, p) for name, p in model.get_submodule(path).named_parameters() if id(p) in inside]


def test_equivalent_decay_trains_other_weights(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    """After one step, where kernels have branches only; the run's folder names the key."""
    ends = {}
    for decay in ("plain", "equivalent"):
        (tmp_path / decay).mkdir()
        run = looked(tmp_path / decay, tiny_data, epochs=1, batch=8, nbs=8, decay=decay, weight_decay=0.1)
        ends[decay] = run.trainer.model.state_dict()
        assert YAML.load(run.folder / "args.yaml").get("decay", "plain") == decay
    kernel, other = "model.1.branches.kxk.conv.weight", "model.0.conv.weight"
    assert not torch.equal(ends["plain"][kernel], ends["equivalent"][kernel])
    torch.testing.assert_close(ends["plain"][other], ends["equivalent"][other])


def test_weight_decay_is_annealed_and_resumed(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    """0.0005 to a tenth of it in five epochs, the third of which is halfway; killed after two of them."""

    class Killed(Looking):
        seen: list[list[dict[str, Any]]] = []

        def save_model(self) -> Any:
            saved = super().save_model()
            if self.epoch == 1:
                raise KeyboardInterrupt
            return saved

    (tmp_path / "scaled.yaml").write_text(SCALED)
    keys = train_args(tiny_data, tmp_path, epochs=5, wdf=0.1, decay="equivalent", batch=8, nbs=8)
    with pytest.raises(KeyboardInterrupt):
        YOLO(str(tmp_path / "scaled.yaml")).train(trainer=Killed, **keys)
    resumed = type("Looking", (Looking,), {"seen": []})
    YOLO(str(tmp_path / "run" / "weights" / "last.pt")).train(trainer=resumed, resume=True)
    largest = [max(group["weight_decay"] for group in epoch) for epoch in Killed.seen + resumed.seen]
    assert largest == pytest.approx([5e-4, 4.341e-4, 2.75e-4, 1.159e-4, 5e-5], rel=1e-3)
    assert [len(groups) for groups in Killed.seen + resumed.seen] == [len(Killed.seen[0])] * 5
    assert any(group.get("param_group") == "equivalent" for group in resumed.seen[0]), "of the checkpoint's arguments"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"decay": "custom"}, "decay='custom' is unknown; accepted are plain and equivalent"),
        ({"wdf": 2}, "wdf=2 is not accepted.*from 0 to 1"),
        ({"wdf": "small"}, "wdf='small' is not accepted"),
        ({"wdf": True}, "wdf=True is not accepted"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    keys: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ValueError, match=said):
        YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, **keys))
    assert not (tmp_path / "run").exists()


def test_equivalent_decay_with_adamw_is_refused(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    arguments = train_args(tiny_data, tmp_path, decay="equivalent", optimizer="auto")
    with pytest.raises(TypeError, match="AdamW does not take decay=equivalent.*optimizer=SGD"):
        YOLO(str(model_yaml(tmp_path))).train(trainer=RepTrainer, **arguments)


def test_keys_survive_the_way_to_the_workers_of_several_gpus(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    """Which make their trainer from the arguments of the first one, checked against the keys of Ultralytics."""
    first = RepTrainer(overrides={"model": str(model_yaml(tmp_path)), **train_args(tiny_data, tmp_path, decay="equivalent")})
    second = RepTrainer(cfg={**vars(get_cfg()), "save_dir": ""}, overrides=dict(vars(first.args)))
    assert training_keys.of(second.args) == {**training_keys.DEFAULTS, "decay": "equivalent"}


def test_a_run_without_our_keys_leaves_no_trace_of_them(tiny_data: Path, tmp_path: Path) -> None:  # noqa: F811
    first = RepTrainer(overrides={"model": str(model_yaml(tmp_path)), **train_args(tiny_data, tmp_path, decay="plain")})
    assert not set(training_keys.DEFAULTS) & (vars(first.args).keys() | YAML.load(tmp_path / "run" / "args.yaml").keys())


# ---- the files -----------------------------------------------------------------------------------------------------------


def test_every_recipe_is_of_a_family() -> None:
    assert sorted(file.stem for file in RECIPES) == sorted(FAMILIES)
    assert recipes.names() == sorted(f"{name}.yaml" for name in FAMILIES)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_hold_what_ultralytics_and_our_trainer_accept(file: Path) -> None:
    content = YAML.load(file)
    assert "Source:" in file.read_text(), "where the numbers are from"
    given, ours = training_keys.split(content)
    if not MUON and content["optimizer"] == "MuSGD":
        pytest.skip("of Ultralytics 8.4")
    args = get_cfg(overrides=given)
    assert args.epochs >= 40 and args.batch >= 64 and args.imgsz == 640
    assert args.optimizer != "auto", "which would not heed lr0"
    assert set(ours) <= set(training_keys.DEFAULTS)
    assert not {"model", "data", "device", "project", "name"} & set(content), "the user's to choose"


def test_the_page_names_every_recipe_and_key() -> None:
    page = (ROOT / "docs" / "coco.md").read_text()
    assert [file.name for file in RECIPES if f"`{file.name}`" not in page] == []
    keys = {key for file in RECIPES for key in YAML.load(file)} - {"epochs", "imgsz"}
    told = page + " ".join(
        ["warmup_epochs warmup_momentum warmup_bias_lr hsv_h hsv_s hsv_v"] if "`warmup_*`" in page else []
    )
    assert [key for key in keys if key not in told] == []


def test_golden_numbers() -> None:
    content = {file.stem: YAML.load(file) for file in RECIPES}
    assert (content["repvgg"]["decay"], content["repvgg"]["weight_decay"]) == ("equivalent", 0.0002)
    assert content["qarepvgg"].get("decay", "plain") == "plain" and content["qarepvgg"]["weight_decay"] == 0.0005
    assert (content["efficientrep-n"]["lr0"], content["efficientrep-s"]["lr0"]) == (0.02, 0.01)
    assert (content["efficientrep-l"]["scale"], content["efficientrep-l"]["mixup"]) == (0.9, 0.1)
    assert (content["yolov7"]["lrf"], content["yolov7"]["mixup"], content["yolov7-tiny"]["mixup"]) == (0.1, 0.15, 0.05)
    assert (content["mobileone"]["weight_decay"], content["mobileone"]["wdf"]) == (0.0001, 0.1)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model_yaml(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    """What `rep-yolo train` asks Ultralytics to train with."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Model, "train", lambda self, **kwargs: seen.update(kwargs))
    assert main(["train", "model=tiny-mixed-detect.yaml", "data=coco8.yaml", *args]) == 0
    return seen


@pytest.mark.parametrize("name", ["repvgg.yaml", "repvgg", str(ROOT / "cfg" / "recipes" / "repvgg.yaml")])
def test_a_recipe_is_found_by_name(inside: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen = asked(monkeypatch, f"cfg={name}", "epochs=7")
    assert (seen["decay"], seen["weight_decay"], seen["epochs"], seen["data"]) == ("equivalent", 0.0002, 7, "coco8.yaml")
    assert seen["optimizer"] == "SGD"


def test_what_the_command_says_comes_before_the_recipe_wherever_it_stands(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(monkeypatch, "lr0=0.5", "decay=plain", "cfg=repvgg.yaml", "wdf=0.5").items() >= {
        ("lr0", 0.5),
        ("decay", "plain"),
        ("wdf", 0.5),
    }


def test_a_file_of_the_users_comes_before_ours(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inside / "repvgg.yaml").write_text("lr0: 0.125\n")
    assert asked(monkeypatch, "cfg=repvgg.yaml")["lr0"] == 0.125


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["cfg=repvg.yaml"], "recipe 'repvg.yaml' does not exist. Did you mean repvgg.yaml"),
        (["cfg=nowhere/repvgg.yaml"], "'nowhere/repvgg.yaml' does not exist"),
        (["decya=plain"], "'decya' is not a valid YOLO argument. Similar arguments are"),
        (["decay=custom"], "decay='custom' is unknown; accepted are plain and equivalent"),
        (["cfg=bad.yaml"], "'weight_decays' is not a valid YOLO argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    inside: Path,
    tiny_data: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    said: str,
) -> None:
    (inside / "bad.yaml").write_text("weight_decays: 1\n")
    assert main(["train", "model=tiny-mixed-detect.yaml", f"data={tiny_data}", *args, *QUIET, f"project={inside}"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("rep-yolo:") and said in line]


def test_a_key_of_a_training_is_refused_elsewhere(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["val", "model=tiny-mixed-detect.yaml", "data=coco8.yaml", "decay=plain"]) == 2
    assert "'decay' is not a valid YOLO argument" in capsys.readouterr().err


def test_rep_yolo_trains_by_a_recipe(inside: Path, tiny_data: Path) -> None:  # noqa: F811
    words = ["cfg=repvgg.yaml", "batch=4", "epochs=1", "close_mosaic=0", f"project={inside}", "name=run"]
    assert main(["train", "model=tiny-mixed-detect.yaml", f"data={tiny_data}", *words, *QUIET]) == 0
    args = YAML.load(inside / "run" / "args.yaml")
    assert (args["decay"], args["weight_decay"], args["batch"], args["optimizer"]) == ("equivalent", 0.0002, 4, "SGD")


ELSEWHERE = "from rep_backbones.yolo import recipes; print(recipes.find('repvgg.yaml')); assert len(recipes.names()) > 5"


@pytest.mark.slow
def test_recipes_are_found_from_a_wheel_and_from_a_checkout(tmp_path: Path) -> None:
    """An editable install is a checkout on the path."""
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    subprocess.run(build, capture_output=True, check=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    for home, folder in ((tmp_path / "site", "rep_backbones/cfg"), (copy, "cfg")):
        env = {**os.environ, "PYTHONPATH": str(home)}
        done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(home / folder / "recipes" / "repvgg.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_recipe_trains_its_family(tmp_path: Path, tiny_data: Path, name: str) -> None:  # noqa: F811
    """One epoch at a narrow width, on 64 pixels."""
    model, extra = FAMILIES[name]
    content = YAML.load(recipes.find(name))
    if content["optimizer"] == "MuSGD" and not MUON:
        pytest.skip("of Ultralytics 8.4")
    if "expand" not in extra and (found := find(model)) is None:
        pytest.skip(f"{model} is not here")
    if "expand" not in extra:
        config = {"scale": "n", **YAML.load(found.file)}  # a trunk may be chosen by it
        config["scales"] = {config["scale"]: [0.1, 0.1, 128]}
        YAML.save(tmp_path / "narrow.yaml", config)
        model = str(tmp_path / "narrow.yaml")
    words = [f"{key}={value}" for key, value in extra.items()]
    words += [f"model={model}", f"cfg={name}.yaml", f"data={tiny_data}", f"project={tmp_path}", "name=run"]
    assert main(["train", *words, *QUIET, "epochs=1", "batch=4", "nbs=4", "close_mosaic=0", "amp=False"]) == 0
    assert (tmp_path / "run" / "weights" / "best.pt").exists()
    args = YAML.load(tmp_path / "run" / "args.yaml")
    same = ("lr0", "weight_decay", "optimizer", "mixup", "momentum")
    assert {key: args[key] for key in same if key in content} == {key: content[key] for key in same if key in content}
    ours = {key: content[key] for key in training_keys.DEFAULTS if key in content}
    assert {key: args[key] for key in training_keys.DEFAULTS if key in args} == training_keys.changed(ours)

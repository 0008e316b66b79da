"""`pretrained=` and `YOLO(...).load` with a file of other people's weights; `load_weights` with Ultralytics' own."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import foreign_models as theirs
import numpy as np
import pytest
import torch
from test_weights import equal, made, outputs, rows
from test_weights_refused import Runs
from torch import Tensor
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML
from yolo_helpers import noise, tiny_data, tiny_run, train_args  # noqa: F401

import rep_backbones
from rep_backbones.rules import multi_branch
from rep_backbones.weights import WeightsError
from rep_backbones.yolo import cli
from rep_backbones.yolo.pretrained import holds_weights
from rep_backbones.yolo.trainer import RepTrainer


@pytest.fixture(scope="module")
def source() -> Any:
    return made(theirs.YOLOv7)


@pytest.fixture
def weights(source: Any, tmp_path: Path) -> Path:
    torch.save({"model": source.state_dict(), "epoch": 299}, tmp_path / "yolov7.pth")
    return tmp_path / "yolov7.pth"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    YAML.save(tmp_path / "rows.yaml", theirs.YOLOv7.YAML)
    return tmp_path / "rows.yaml"


def is_loaded(model: Any, source: Any) -> bool:
    return torch.equal(model.model[0].conv.weight.cpu(), source.model[0].conv.weight)


@torch.no_grad()
def same(source: Any, model: Any) -> None:
    equal(source(noise()), outputs(model.eval(), rows(model, *range(9)), noise()))


def test_load_of_ultralytics(weights: Path, yaml: Path, source: Any) -> None:
    model = YOLO(str(yaml)).load(str(weights))
    same(source, model.model)
    assert rep_backbones.load_weights(YOLO(str(yaml)), weights).format == "YOLOv7's"


def test_a_bare_state_dict_called_pt(source: Any, yaml: Path, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = YOLO(str(yaml)).load(str(tmp_path / "weights.pt")).model
    assert is_loaded(model, source)
    same(source, model)


def test_load_into_an_expanded_model(source: Any, weights: Path, tmp_path: Path) -> None:
    YAML.save(tmp_path / "expanded.yaml", {**theirs.YOLOv7.YAML, "expand": "DiverseBranchBlock"})
    model: Any = YOLO(str(tmp_path / "expanded.yaml")).load(str(weights)).model
    assert len(multi_branch(model)) > 2
    same(source, model)


def test_a_refused_file_leaves_the_model(source: Any, yaml: Path, tmp_path: Path) -> None:
    state = source.state_dict()
    del state["model.4.conv.weight"]
    torch.save(state, tmp_path / "cut.pth")
    model = YOLO(str(yaml))
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match=r"cut\.pth.*model\.4"):
        model.load(str(tmp_path / "cut.pth"))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.model.state_dict().items())  # type: ignore[union-attr]


def test_training_starts_from_it(source: Any, weights: Path, yaml: Path, tiny_data: Path, tmp_path: Path) -> None:  # noqa: F811
    args = train_args(tiny_data, tmp_path, model=str(yaml), pretrained=str(weights))
    trainer: Any = RepTrainer(overrides=args)
    trainer.setup_model()
    assert is_loaded(trainer.model, source)
    seen: list[bool] = []
    loaded = YOLO(str(yaml)).load(str(weights))
    loaded.add_callback("on_train_start", lambda trainer: seen.append(is_loaded(trainer.model, source)))
    loaded.train(**train_args(tiny_data, tmp_path, epochs=1))
    assert seen == [True]


def test_a_yaml_that_names_its_weights(source: Any, weights: Path, tiny_data: Path, tmp_path: Path) -> None:  # noqa: F811
    YAML.save(tmp_path / "named.yaml", {**theirs.YOLOv7.YAML, "pretrained": str(weights)})
    trained = {}
    for pretrained in (True, False):
        args = train_args(tiny_data, tmp_path, model=str(tmp_path / "named.yaml"), pretrained=pretrained)
        trainer: Any = RepTrainer(overrides=args)
        trainer.setup_model()
        trained[pretrained] = is_loaded(trainer.model, source)
    assert trained == {True: True, False: False}


def pickled_as(model: Any, package: str, file: Path, without: type | None = None) -> None:
    """A file with the whole model, of classes that are not here (but one), as its authors' code writes it."""
    module = types.ModuleType(f"{package}.yolo")
    classes = [cls for cls in {type(part) for part in model.modules()} - {without} if cls.__module__ == theirs.__name__]
    kept = {cls: cls.__module__ for cls in classes}
    try:
        for cls in classes:
            cls.__module__ = module.__name__
            setattr(module, cls.__name__, cls)
        sys.modules.update({package: types.ModuleType(package), module.__name__: module})
        torch.save({"model": model, "ema": None, "epoch": -1, "best_fitness": np.float64(0.5)}, file)
    finally:
        for name in (package, module.__name__):
            sys.modules.pop(name, None)
        for cls, name in kept.items():
            cls.__module__ = name


@pytest.mark.parametrize("package", ["models", "yolov6"])
def test_a_whole_model_of_classes_that_are_not_here(package: str, yaml: Path, tmp_path: Path) -> None:
    whole: Any = made(theirs.YOLOv7, seed=5)
    pickled_as(whole, package, tmp_path / "whole.pt")
    model = YOLO(str(yaml))
    assert rep_backbones.load_weights(model, tmp_path / "whole.pt").format == "YOLOv7's"
    same(whole, model.model)
    same(whole, YOLO(str(yaml)).load(str(tmp_path / "whole.pt")).model)


def test_a_whole_model_of_any_other_package(yaml: Path, tmp_path: Path) -> None:
    pickled_as(made(theirs.YOLOv7), "elsewhere", tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"whole\.pt.*elsewhere\.yolo"):
        rep_backbones.load_weights(YOLO(str(yaml)), tmp_path / "whole.pt")


def test_one_layer_of_any_other_package(yaml: Path, tmp_path: Path) -> None:
    pickled_as(made(theirs.YOLOv7), "models", tmp_path / "whole.pt", without=theirs.RepConv7)
    with pytest.raises(WeightsError, match=r"whole\.pt"):
        rep_backbones.load_weights(YOLO(str(yaml)), tmp_path / "whole.pt")


def test_code_in_a_whole_model(yaml: Path, tmp_path: Path) -> None:
    whole: Any = made(theirs.YOLOv7)
    whole.evil = Runs(tmp_path / "made")
    pickled_as(whole, "models", tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"nothing in it was executed"):
        rep_backbones.load_weights(YOLO(str(yaml)), tmp_path / "whole.pt")
    assert not (tmp_path / "made").exists()


def test_the_command(weights: Path, yaml: Path, tiny_data: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:  # noqa: F811
    settings = {**train_args(tiny_data, tmp_path, epochs=1), "model": yaml}
    command = ["train", *(f"{key}={value}" for key, value in settings.items())]
    assert cli.main([*command, f"pretrained={weights}"]) == 0
    assert "yolov7.pth, YOLOv7's names: 95 of 101 tensors loaded" in caplog.text
    torch.save({"model": Runs(tmp_path / "made")}, tmp_path / "evil.pth")
    assert cli.main([*command, f"pretrained={tmp_path / 'evil.pth'}"]) == 2
    assert "evil.pth" in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_ultralytics(tiny_run: Path) -> None:  # noqa: F811
    best = tiny_run / "weights" / "best.pt"
    trained: Any = rep_backbones.yolo.checkpoint.load_precise(best).model
    target: Any = made(lambda: DetectionModel(trained.yaml, verbose=False), seed=3)
    report = rep_backbones.load_weights(target, best)
    assert not holds_weights(best)
    assert report.source == str(best) and report.format == "our own" and not report.unused and not report.missing
    state: dict[str, Tensor] = trained.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in target.state_dict().items())
    fused: Any = DetectionModel(trained.yaml, verbose=False).eval().fuse(verbose=False)
    with pytest.raises(WeightsError, match="eps of its norms is not in a state dict"):
        rep_backbones.load_weights(fused, state)
    assert not rep_backbones.load_weights(fused, best).missing
    with torch.no_grad():
        equal(*(outputs(model, rows(model, 0, 1, 2, 3), noise())[:4] for model in (trained, fused)))
    (best.parent / "cut.pt").write_bytes(best.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"cut\.pt.*damaged"):
        rep_backbones.load_weights(target, best.parent / "cut.pt")

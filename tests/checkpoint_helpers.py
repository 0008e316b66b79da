"""Small models, and checkpoints as Ultralytics writes them, for the tests of safe loading."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

from rep_backbones.yolo import checkpoint

PROTOCOL = b"\x80\x02"  # the first instruction of a pickle
CLASSES = {
    "detect": tasks.DetectionModel,
    "segment": tasks.SegmentationModel,
    "pose": tasks.PoseModel,
    "obb": tasks.OBBModel,
    "classify": tasks.ClassificationModel,
}


def tiny_yaml() -> dict[str, Any]:
    """A detector of four rows that builds in a few milliseconds."""
    return {
        "nc": 2,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C2f", [16, True]]],
        "head": [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc"]]],
    }


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with statistics, weights and biases that show every error, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias):
                    tensor.uniform_(-0.3, 0.3, generator=generator)
                for tensor in (module.running_var, module.weight):
                    tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def built(config: dict[str, Any] | str, task: str = "detect", seed: int = 0) -> nn.Module:
    """A model of a YAML (or of the name of a stock one), as the trainers of Ultralytics leave it."""
    config = tasks.yaml_model_load(config) if isinstance(config, str) else copy.deepcopy(config)
    torch.manual_seed(seed)
    model = CLASSES[task](config, ch=3, nc=config["nc"] if task != "classify" else 5, verbose=False)
    model.names = {index: f"class {index}" for index in range(model.yaml["nc"])}
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    model.task = task
    return randomized(model, seed)


def contents(model: nn.Module, /, **entries: Any) -> dict[str, Any]:
    """What Ultralytics saves during training: the EMA in FP16, and facts about the run."""
    ema = copy.deepcopy(model).half()
    for parameter in ema.parameters():
        parameter.requires_grad_(False)
    return {
        "epoch": 3,
        "best_fitness": 0.5,
        "model": None,
        "ema": ema,
        "updates": 12,
        "optimizer": None,
        "train_args": {**DEFAULT_CFG_DICT, "imgsz": 64},
        "date": "2026-01-02T03:04:05",
        "version": ultralytics.__version__,
        **entries,
    }


def saved(path: Path, model: nn.Module, /, **entries: Any) -> Path:
    torch.save(contents(model, **entries), path)
    return path


def plainly(path: Path) -> nn.Module:
    """The model of a file as Ultralytics' own loader has it: unpickled, which is why it is only for files made here."""
    file = torch.load(path, map_location="cpu", weights_only=False)
    return (file.get("ema") or file["model"]).float().eval()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])


def outputs(model: nn.Module, size: int = 64) -> list[torch.Tensor]:
    """Every tensor that the model puts out for one picture of noise."""
    with torch.no_grad():
        return list(tensors(model(torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7)))))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second))


def archive(
    path: Path, program: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A file like those of torch.save with a pickle of our own."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"x/data.pkl": program, "x/version": b"3\n", **(records or {})}.items():
            file.writestr(name, data)
    return path


def refused(path: Path | str, *, checked: bool = True) -> str:
    """The message with which `load` (and `check`, unless told otherwise) refuses; it names the file."""
    with pytest.raises(checkpoint.Refused) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert str(path) in message and message.endswith("."), message
    if checked:
        with pytest.raises(checkpoint.Refused):
            checkpoint.check(path)
    return message

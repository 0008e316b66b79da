"""Small models and a drawn data set that the tests of the adapter share.

A test module imports the fixtures by name: `from yolo_helpers import tiny_data, tiny_run  # noqa: F401`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.engine.exporter import Exporter

NAMES = ("disc", "box", "cross")

# The stem is stock: the backward of a 1x1 stride-2 conv with 3 input channels crashes under compile=True on a CPU.
ROWS = {
    "RepConv": """
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepConv, [16, 3, 2]]
  - [-1, 2, RepConv, [32, 3, 2]]
  - [-1, 1, RepConv, [32, 3, 2]]""",
    "RepVGGBlock": """
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepVGGBlock, [16, 3, 2]]
  - [-1, 2, RepVGGBlock, [32, 3, 2]]
  - [-1, 1, RepVGGBlock, [32, 3, 2]]""",
    "mixed": """
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepVGGBlock, [16, 3, 2]]
  - [-1, 2, RepConv, [32, 3, 2]]
  - [-1, 1, RepVGGBlock, [32, 3, 2]]""",
    "trunk": """
  - [-1, 1, RepVGG, [a0, {width: 0.125, depth: 0.25}]]
  - [0, 1, Index, [None, 2]]
  - [0, 1, Index, [None, 3]]
  - [0, 1, Index, [None, 4]]""",
    "Conv": """
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]""",
}
MULTI_BRANCH = {"RepConv": 4, "RepVGGBlock": 4, "mixed": 4, "trunk": 8, "Conv": 0}  # layers with branches in each of ROWS
HEADS = {
    "detect": "[[2, 3], 1, Detect, [nc]]",
    "segment": "[[2, 3], 1, Segment, [nc, 4, 8]]",
    "pose": "[[2, 3], 1, Pose, [nc, [1, 3]]]",
    "obb": "[[2, 3], 1, OBB, [nc, 1]]",
    "classify": "[-1, 1, Classify, [nc]]",
}


def model_yaml(folder: Path, rows: str = "mixed", task: str = "detect", nc: int = len(NAMES)) -> Path:
    """A model of five rows, 64 px in seconds, as a YAML file in `folder`; strides 8 and 16 where the head has two levels."""
    path = folder / f"tiny-{rows.lower()}-{task}.yaml"
    extra = "kpt_shape: [1, 3]\n" if task == "pose" else ""
    path.write_text(f"nc: {nc}\n{extra}backbone:{ROWS[rows]}\nhead:\n  - {HEADS[task]}\n")
    return path


def draw(kind: int, rng: np.random.Generator, size: int = 64) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """One shape on noise: the picture (size, size, 3) uint8 and its box (cx, cy, w, h) in fractions of the size."""
    picture = rng.integers(0, 70, (size, size, 3), dtype=np.uint8)
    radius = int(rng.integers(10, 18))
    x, y = (int(v) for v in rng.integers(radius + 1, size - radius - 1, 2))
    color = tuple(int(v) for v in rng.integers(130, 256, 3))
    if kind == 0:
        cv2.circle(picture, (x, y), radius, color, -1)
    elif kind == 1:
        cv2.rectangle(picture, (x - radius, y - radius), (x + radius, y + radius), color, -1)
    else:
        cv2.line(picture, (x - radius, y - radius), (x + radius, y + radius), color, 5)
        cv2.line(picture, (x - radius, y + radius), (x + radius, y - radius), color, 5)
    return picture, (x / size, y / size, 2 * radius / size, 2 * radius / size)


def _label(task: str, kind: int, box: tuple[float, float, float, float]) -> str:
    cx, cy, w, h = box
    corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy - h / 2, cx + w / 2, cy + h / 2, cx - w / 2, cy + h / 2)
    values: tuple[float, ...] = corners if task in {"segment", "obb"} else box
    if task == "pose":
        values = (*box, cx, cy, 2)  # the centre as a visible keypoint
    return " ".join(str(value) for value in (kind, *values))


def make_data(folder: Path, task: str = "detect", pictures: int = 8, size: int = 64) -> Path:
    """A data set of one shape per picture, the same pictures for train and val; returns what `data=` takes.

    That is a YAML, and for "classify" the folder with a folder of pictures for each class.
    """
    rng = np.random.default_rng(0)
    for i in range(pictures):
        kind = i % len(NAMES)
        picture, box = draw(kind, rng, size)
        parts = [f"{part}/{NAMES[kind]}" for part in ("train", "val")] if task == "classify" else ["images"]
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / part / f"{i:02d}.png"), picture)
        if task != "classify":
            (folder / "labels").mkdir(exist_ok=True)
            (folder / "labels" / f"{i:02d}.txt").write_text(_label(task, kind, box) + "\n")
    if task == "classify":
        return folder
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    extra = "kpt_shape: [1, 3]\n" if task == "pose" else ""
    (folder / "data.yaml").write_text(f"path: {folder.as_posix()}\ntrain: images\nval: images\n{extra}names:\n{names}")
    return folder / "data.yaml"


def train_args(data: Path, project: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a training of seconds: 64 pixels, batch 4, one optimizer step per batch, no plots."""
    quiet = {"plots": False, "verbose": False, "workers": 0, "device": "cpu", "exist_ok": True}
    short = {"epochs": 2, "imgsz": 64, "batch": 4, "nbs": 4, "warmup_epochs": 0, "optimizer": "SGD", "seed": 7}
    return {**quiet, **short, "data": str(data), "project": str(project), "name": "run", **changes}


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives each batch norm statistics and weights that a wrong fold cannot hide behind; changes and returns `model`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.3)
                module.weight.copy_(torch.randn(shape, generator=generator) * 0.4 + 0.8)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.3)
    return model


def built(folder: Path, rows: str = "mixed", seed: int = 0) -> nn.Module:
    """The detector of `model_yaml` in eval mode, its norms with random statistics."""
    from ultralytics.nn.tasks import DetectionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_norms(DetectionModel(str(model_yaml(folder, rows)), verbose=False), seed).eval()


def narrow(name: str) -> nn.Module:
    """The model of a packaged YAML, of the same rows, narrow and shallow."""
    from ultralytics.nn import tasks

    from rep_backbones.registry import TRUNKS

    torch.manual_seed(0)
    config = tasks.yaml_model_load(name)
    config["scale"] = config.get("scale") or "n"
    config.setdefault("scales", {})[config["scale"]] = [0.33, 0.125, 1024]
    for row in config["backbone"]:
        if row[2] in TRUNKS:
            row[3] = [*row[3], {"width": 0.125, "depth": 0.25}]
    model = (tasks.ClassificationModel if "-cls" in name else tasks.DetectionModel)(config, verbose=False)
    model.task = tasks.guess_model_task(model)
    return model


def noise(n: int = 2, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Pictures of noise, (n, 3, size, size) in [0, 1], the same ones each time."""
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# a fixture that several modules import is one of each module's own; what it makes is shared here
_MADE: dict[Path, Path] = {}


def _once(folder: Path, build: Callable[[Path], Path]) -> Path:
    if folder not in _MADE:
        folder.mkdir()
        _MADE[folder] = build(folder)
    return _MADE[folder]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML of the drawn detection data set."""
    return _once(tmp_path_factory.getbasetemp() / "tiny_data", make_data)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Folder of a finished run of RepTrainer: two epochs of the detector with `mixed` rows, weights in weights/."""

    def build(folder: Path) -> Path:
        from ultralytics import YOLO

        from rep_backbones.yolo.trainer import RepTrainer

        YOLO(str(model_yaml(folder))).train(trainer=RepTrainer, **train_args(tiny_data, folder))
        return folder / "run"

    return _once(tmp_path_factory.getbasetemp() / "tiny_run", build)


def spoiling(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Path], object]) -> None:
    """What the exporter of a format makes is changed by `spoil` before anyone looks at it."""
    stock = getattr(Exporter, f"export_{name}")

    def spoilt(self: Exporter, *args: Any, **kwargs: Any) -> Any:
        made = stock(self, *args, **kwargs)
        spoil(Path(made[0] if isinstance(made, tuple) else made))
        return made

    monkeypatch.setattr(Exporter, f"export_{name}", spoilt)

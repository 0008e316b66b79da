"""What is trained: one detector with each kind of branches, on each data set, with each seed, under two budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from ultralytics import YOLO

from rep_backbones.rep_optimizers import RepAdamW
from rep_backbones.training_forms import BRANCHES, GRADIENT, ONLINE
from rep_backbones.yolo.training_form import to_gradient

EPOCHS, WALL_TIME = "epochs", "wall time"
BUDGETS = {
    EPOCHS: "the same number of epochs for all",
    WALL_TIME: "as many epochs as take the time of the plain detector's, by the step times above",
}


@dataclass(frozen=True)
class Variant:
    """The layer that stands in all 3x3 places of the detector, and the form in which its branches are trained."""

    name: str
    layer: str
    mode: str = BRANCHES

    @property
    def optimizer(self) -> str:
        """By the name that the trainer knows."""
        return "RepAdamW" if self.mode == GRADIENT else "AdamW"


PLAIN = "plain"
VARIANTS = (
    Variant(PLAIN, "ConvBNAct"),
    Variant("RepVGG", "RepVGGBlock"),
    Variant("ACNet", "ACBlock"),
    Variant("DBB", "DiverseBranchBlock"),
    Variant("MobileOne", "MobileOneBlock"),
    Variant("QARepVGG", "QARepVGGBlock"),
    Variant("RepVGG, online", "RepVGGBlock", ONLINE),
    Variant("RepVGG, gradient", "RepVGGBlock", GRADIENT),
)


@dataclass(frozen=True)
class Profile:
    """How large the study is.

    Attributes:
        widths: channels at strides 2, 4, 8, 16 and 32.
        repeats: layers behind each strided one.
        size: pixels of a side, of training, evaluation and deployment.
        epochs: of the first budget.
        training: arguments of the trainer, the same for all.
        drawn: training and validation pictures of the drawn shapes.
        device: of the training.
        jobs: runs at the same time, each with its share of the cores; 0: one for each core.
        rounds: steps of each variant that are timed.
    """

    widths: tuple[int, int, int, int, int]
    repeats: int
    size: int
    epochs: int
    training: Mapping[str, Any]
    drawn: tuple[int, int] = (320, 80)
    device: str = "cpu"
    jobs: int = 0
    rounds: int = 25


_ALIKE = {
    "optimizer": "AdamW",
    "cos_lr": True,
    "lrf": 0.02,
    "weight_decay": 0.01,
    "mosaic": 0.0,
    "val": False,  # the last weights count: none are chosen by the pictures that they are measured on
    "plots": False,
    "cache": True,
}
PROFILES = {
    "cpu": Profile(
        (16, 16, 32, 64, 96), 1, 160, 10, {**_ALIKE, "batch": 8, "nbs": 8, "lr0": 0.0025, "warmup_epochs": 0, "workers": 0}
    ),
    "full": Profile(
        (32, 64, 128, 256, 512),
        2,
        640,
        100,
        {**_ALIKE, "batch": 16, "nbs": 16, "lr0": 0.001, "warmup_epochs": 3, "workers": 8},
        drawn=(2000, 500),
        device="0",
        jobs=1,
    ),
    "quick": Profile(
        (4, 4, 4, 8, 8),
        1,
        64,
        1,
        {**_ALIKE, "batch": 4, "nbs": 4, "lr0": 0.001, "warmup_epochs": 0, "workers": 0},
        (4, 2),
        rounds=2,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: which data, variant, seed and number of epochs, and how: the model YAML and the trainer's arguments."""

    data: str
    variant: str
    seed: int
    epochs: int
    size: int
    detector: dict[str, Any] = field(hash=False)
    arguments: dict[str, Any] = field(hash=False)

    @property
    def place(self) -> str:
        """Its folder in the study's."""
        return f"{self.data}/{self.variant.replace(', ', '-').lower()}-{self.epochs}-epochs-seed-{self.seed}"

    def spec(self) -> dict[str, Any]:
        """As plain data, without paths: what must be the same if a result is to be this run's."""
        return asdict(self)


def runs(profile: Profile, classes: Mapping[str, int], seeds: int, epochs: Mapping[str, Mapping[str, int]]) -> Iterator[Run]:
    """All trainings, each once, seed by seed, so that a study that was stopped has as many of each.

    Args:
        classes: how many each data set has, by name.
        epochs: by budget and variant.
    """
    for seed in range(seeds):
        for data, count in classes.items():
            for variant in VARIANTS:
                model = detector(variant, profile, count)
                arguments = {**profile.training, "optimizer": variant.optimizer, "device": profile.device}
                for budgeted in dict.fromkeys(epochs[budget][variant.name] for budget in BUDGETS):
                    yield Run(data, variant.name, seed, budgeted, profile.size, model, arguments)


def budgets(profile: Profile, times: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Epochs by budget and variant, of step times as multiples of the plain detector's."""
    return {
        EPOCHS: {variant.name: profile.epochs for variant in VARIANTS},
        WALL_TIME: {variant.name: max(round(profile.epochs / times[variant.name]), 1) for variant in VARIANTS},
    }


def detector(variant: Variant, profile: Profile, classes: int) -> dict[str, Any]:
    """The model YAML: a trunk of 3x3 layers with strides 2 to 32, a path aggregation neck and Ultralytics' head."""
    w, layer = profile.widths, variant.layer
    relu = {"act": "ReLU"}
    trunk: list[Any] = [[-1, 1, layer, [w[0], 3, 2, relu]]]
    for width in w[1:]:
        trunk += [[-1, 1, layer, [width, 3, 2, relu]], [-1, profile.repeats, layer, [width, 3, 1, relu]]]
    up = [-1, 1, "nn.Upsample", [None, 2, "nearest"]]
    neck: list[Any] = [
        up,
        [[-1, 6], 1, "Concat", [1]],  # with stride 16
        [-1, 1, layer, [w[3], 3, 1, relu]],  # 11
        up,
        [[-1, 4], 1, "Concat", [1]],  # with stride 8
        [-1, 1, layer, [w[2], 3, 1, relu]],  # 14
        [-1, 1, layer, [w[3], 3, 2, relu]],
        [[-1, 11], 1, "Concat", [1]],
        [-1, 1, layer, [w[3], 3, 1, relu]],  # 17
        [-1, 1, layer, [w[4], 3, 2, relu]],
        [[-1, 8], 1, "Concat", [1]],
        [-1, 1, layer, [w[4], 3, 1, relu]],  # 20
        [[14, 17, 20], 1, "Detect", ["nc"]],
    ]
    config: dict[str, Any] = {"nc": classes, "backbone": trunk, "head": neck}
    return {**config, "mode": ONLINE} if variant.mode == ONLINE else config


def written(detector: Mapping[str, Any], file: Path) -> Path:
    """The file, with the model YAML in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(detector), sort_keys=False), encoding="utf-8")
    return file


def built(variant: Variant, file: Path) -> nn.Module:
    """The detector of a YAML in the form in which the variant trains it, and with the same random numbers each time."""
    torch.manual_seed(0)
    model: Any = YOLO(file).model
    return to_gradient(model) if variant.mode == GRADIENT else model


def optimizer_of(variant: Variant, model: nn.Module) -> torch.optim.Optimizer:
    """What trains the variant, with a learning rate that changes nothing."""
    if variant.mode == GRADIENT:
        return RepAdamW(model.parameters(), model=model, lr=0.0)
    return torch.optim.AdamW(model.parameters(), lr=0.0)

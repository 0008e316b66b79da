"""What branches cost in inference: detectors and classifiers, multi-branch, fused and plain, in every runtime here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.fx.experimental import optimization
from tqdm import tqdm
from ultralytics import YOLO

from rep_backbones.backbones import create_backbone
from rep_backbones.export import charts
from rep_backbones.export.charts import Bar
from rep_backbones.export.latency import rounds
from rep_backbones.fuse import fuse
from rep_backbones.yolo.benchmarks import runtimes
from rep_backbones.yolo.benchmarks.results import Findings, table
from rep_backbones.yolo.deploy import deploy_form
from rep_backbones.yolo.proof import exported_form
from rep_backbones.yolo.shuffled import shuffled
from rep_backbones.yolo.switches import no_downloads, quiet
from rep_backbones.yolo.training_cost import plain_twin

MULTI, FUSED, TWIN = "multi-branch", "fused", "plain twin"
WARMUP = 2  # untimed rounds
Forms = dict[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Group:
    """What is compared: one of our networks in its forms, and others, on pictures of one size.

    Attributes:
        name: of our network.
        forms: of it, `FUSED` among them.
        others: names and networks, as they are deployed.
        size: pixels of a side.
        batches: pictures at once, on the CPU and on a GPU.
    """

    name: str
    forms: Forms
    others: Forms
    size: int
    batches: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """How much is measured: runs at most, seconds of each comparison, and the size of pictures if it is another one."""

    runs: int
    seconds: float
    size: int | None = None


PLANS = {"cpu": Plan(15, 110.0), "cuda": Plan(100, 60.0), "quick": Plan(3, 0.0, 64)}


@dataclass(frozen=True)
class Row:
    """A network in one runtime; milliseconds of each run of a batch, and as multiples of the fused form's in that round."""

    name: str
    runtime: str
    size: int
    batch: int
    ms: list[float]
    of_fused: list[float]


# ---- the networks ---------------------------------------------------------------------------------------------------------


def _yolo(name: str) -> Any:
    torch.manual_seed(0)
    return shuffled(YOLO(f"{name}.yaml").model.eval())  # type: ignore[arg-type,union-attr]


def _detector(name: str, form: str) -> nn.Module:
    model = _yolo(name)
    if form == TWIN:
        model = plain_twin(model).eval()
    return exported_form(model if form == MULTI else deploy_form(model))


def _classifier(name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    model = shuffled(create_backbone(name)).eval()
    if form == TWIN:
        model = plain_twin(model).eval()
    return model if form == MULTI else fuse(model)


def _resnet(name: str) -> nn.Module:
    torch.manual_seed(0)
    return optimization.fuse(torchvision.models.get_model(name).eval())  # its norms merged, as it is deployed


def _forms(make: Callable[[str, str], nn.Module], name: str) -> Forms:
    return {form: partial(make, name, form) for form in (MULTI, FUSED, TWIN)}


DETECTORS = {"cpu": (1,), "cuda": (1, 32)}
CLASSIFIERS = {"cpu": (8,), "cuda": (128,)}  # 128 as in RepVGG's tables
GROUPS = (
    Group(
        "efficientrep-n",
        _forms(_detector, "efficientrep-n"),
        {name: partial(_detector, name, FUSED) for name in ("yolov8n", "yolo11n", "yolo26n")},
        640,
        DETECTORS,
    ),
    Group("repvgg_a2", _forms(_classifier, "repvgg_a2"), {"resnet50": partial(_resnet, "resnet50")}, 224, CLASSIFIERS),
    Group("repvgg_b1g4", _forms(_classifier, "repvgg_b1g4"), {"resnet101": partial(_resnet, "resnet101")}, 224, CLASSIFIERS),
)


# ---- measuring ------------------------------------------------------------------------------------------------------------


def measured(device: torch.device, quick: bool, only: str, runs: int | None) -> Findings:
    """Passes on `device`.

    Args:
        quick: a first look at tiny pictures.
        only: a pattern of the names of our networks; each is compared with all that belongs to it.
        runs: of each at most; None for as many as the plan has.

    Raises:
        ValueError: nothing matches.
    """
    plan = PLANS["quick" if quick else device.type]
    groups = [group for group in GROUPS if fnmatch(group.name, only)]
    if not groups:
        raise ValueError(f"--only {only} matches nothing; there are {', '.join(group.name for group in GROUPS)}")
    openers, notes = runtimes.at_hand(device)
    rows: list[Row] = []
    for group in groups:
        for batch in group.batches[device.type][: 1 if quick else None]:
            rows += _compared(group, batch, device, plan, runs or plan.runs, openers, notes)
    return Findings("Inference", _text(rows), [asdict(row) for row in rows], _picture(rows), notes)


def _compared(
    group: Group, batch: int, device: torch.device, plan: Plan, runs: int, openers: dict[str, Any], notes: list[str]
) -> list[Row]:
    size = plan.size or group.size
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    made = {**{_named(group, form): make for form, make in group.forms.items()}, **group.others}
    calls: dict[tuple[str, str], runtimes.Call] = {}  # network, runtime
    with quiet(), no_downloads():
        for name, make in tqdm(made.items(), desc=f"opening {group.name}", unit="network"):
            there, failed = runtimes.opened(make(), x, openers)
            calls |= {(name, key): call for key, call in there.items()}
            notes += [f"{name}, batch {batch}, does not run in {key}: {why}" for key, why in failed.items()]
    with tqdm(total=WARMUP + runs, desc=f"{group.name}, batch {batch}", unit="round") as bar:
        taken = rounds(calls, runs=runs, warmup=WARMUP, seconds=plan.seconds, each=bar.update)
    fused = {key: ms for (name, key), ms in taken.items() if name == _named(group, FUSED)}
    return [
        Row(name, key, size, batch, ms, [own / other for own, other in zip(ms, fused.get(key, []))])
        for (name, key), ms in taken.items()
    ]


def _named(group: Group, form: str) -> str:
    return f"{group.name}, {form}"


# ---- the page -------------------------------------------------------------------------------------------------------------

ABOUT = (
    "Milliseconds of a batch in float32 (on a GPU convolutions may compute in TF32, as PyTorch's and TensorRT's defaults "
    "have it), and as multiples of the fused form's in the same runtime and round: the median and, in brackets, the "
    "smallest and the largest. All networks and runtimes of a table run in turn. Weights are random. Multi-branch is the "
    "network as it is trained, its norms included; all others have theirs merged. The plain twin is the network with one "
    "convolution and norm in the place of each multi-branch layer, deployed."
)


def _text(rows: Sequence[Row]) -> str:
    parts = [ABOUT]
    tables: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        tables.setdefault((_group_of(row).name, row.size, row.batch), []).append(row)
    for (name, size, batch), those in tables.items():
        keys = list(dict.fromkeys(row.runtime for row in those))
        at = {(row.name, row.runtime): (_ms(row), _spread(row.of_fused)) for row in those}
        cells = [
            [network, *(cell for key in keys for cell in at.get((network, key), ("", "")))]
            for network in dict.fromkeys(row.name for row in those)
        ]
        header = ["network", *(cell for key in keys for cell in (f"{key}, ms", "of fused"))]
        parts += [f"## {name}, batch {batch}, {size} x {size} pixels, {len(those[0].ms)} runs", table(header, cells)]
    return "\n\n".join(parts)


def _group_of(row: Row) -> Group:
    return next(g for g in GROUPS if row.name in g.others or row.name in {_named(g, form) for form in g.forms})


def _picture(rows: Sequence[Row]) -> str:
    hues = {key: hue for hue, key in enumerate(dict.fromkeys(row.runtime for row in rows))}
    found: dict[str, list[Bar]] = {}
    for row in rows:
        each = [ms / row.batch for ms in row.ms]
        dot = Bar(row.runtime, statistics.median(each), min(each), max(each), hues[row.runtime])
        found.setdefault(f"{row.name}, batch {row.batch}", []).append(dot)
    return charts.dots(list(found.items()), "milliseconds for each picture, logarithmic")


def _ms(row: Row) -> str:
    return f"{statistics.median(row.ms):.1f}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""

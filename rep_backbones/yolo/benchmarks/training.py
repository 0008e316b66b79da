"""The price of branches in training: layers and whole detectors against their plain twins, and what users have today."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn import modules as stock

from rep_backbones import one_pass
from rep_backbones.blocks.parts import conv_bn
from rep_backbones.candidates import ExpandError
from rep_backbones.containers import Block, Parallel
from rep_backbones.export import charts
from rep_backbones.export.charts import Bar
from rep_backbones.registry import LAYERS, ours
from rep_backbones.yolo.benchmarks.results import Findings, table
from rep_backbones.yolo.expanding import expand
from rep_backbones.yolo.switches import no_downloads, quiet
from rep_backbones.yolo.training_cost import Cost, plain_twin, step_costs

Shape = tuple[int, int, int]  # pictures, channels, pixels of a side

HERE, TWIN, ONE_PASS = "this package", "plain twin", "one pass"
FLOOR, OF_FLOOR = "floor, conv + BN + ReLU and one 1x1 conv", "this package, against the floor"
OTHERS = ("Ultralytics", "timm")  # whose blocks are in TODAY
WARMUP = 2  # untimed rounds of whole detectors


@dataclass(frozen=True)
class Plan:
    """How much is measured: shapes of the layers' inputs and the detectors', steps at most, and seconds of a comparison."""

    shapes: tuple[Shape, ...]
    detectors: Shape
    runs: int
    seconds: float
    detector_seconds: float


# the shapes of layers at which other people's code was measured
SHAPES: tuple[Shape, ...] = ((8, 32, 80), (8, 64, 40), (8, 128, 20))
PLANS = {
    "cpu": Plan(SHAPES, (4, 3, 256), runs=15, seconds=3.5, detector_seconds=110.0),
    "cuda": Plan(SHAPES, (16, 3, 640), runs=50, seconds=10.0, detector_seconds=120.0),
    "quick": Plan(((1, 8, 8),), (1, 3, 64), runs=3, seconds=0.0, detector_seconds=0.0),
}


def _timm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        from timm.models import byobnet

        return getattr(byobnet, name)(channels, channels, **options)

    return make


# the blocks that users have today, of the same deployed form: ours -> whose -> one with so many channels in and out
TODAY: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "RepConv": {"Ultralytics": lambda c: stock.RepConv(c, c, bn=True)},
    "RepConvN": {"Ultralytics": lambda c: stock.RepConv(c, c)},
    "RepVGGDW": {"Ultralytics": stock.RepVGGDW},
    "RepVGGBlock": {"timm": _timm("RepVggBlock")},
    "MobileOneBlock": {"timm": _timm("MobileOneBlock", num_conv_branches=4)},
}


def _floor(channels: int) -> nn.Module:
    """The least that RepVGG's branches can cost: their convolutions, with one norm."""
    return Block(
        Parallel({"kxk": conv_bn(channels, channels, 3), "1x1": nn.Conv2d(channels, channels, 1, bias=False)}), act=nn.ReLU()
    )


FLOORS = {"RepVGGBlock": _floor}


@dataclass(frozen=True)
class Row:
    """A layer or a detector beside its plain twin, or beside its floor, in turn."""

    name: str
    of: str
    shape: Shape
    cost: Cost
    twin: Cost

    @property
    def times(self) -> list[float]:
        """Multiples of the twin's step time."""
        return self.cost.times(self.twin)

    @property
    def memory(self) -> float:
        """The multiple of the twin's memory."""
        return self.cost.memory(self.twin)

    @property
    def label(self) -> str:
        return self.name if self.of == HERE else f"{self.name}, {self.of}"

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "times": self.times, "memory": self.memory}


class WithLoss(nn.Module):
    """A detector and Ultralytics' loss for drawn boxes, four on each picture. `(n, 3, h, w)` -> `()`."""

    def __init__(self, model: Any, pictures: int) -> None:
        super().__init__()
        self.model = model
        model.args = get_cfg()
        count, generator = 4 * pictures, torch.Generator().manual_seed(0)
        self.register_buffer("batch_idx", torch.arange(pictures).repeat_interleave(4).float())
        self.register_buffer("cls", torch.randint(model.model[-1].nc, (count, 1), generator=generator).float())
        self.register_buffer("bboxes", torch.rand(count, 4, generator=generator) * 0.4 + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.loss({**dict(self.named_buffers(recurse=False)), "img": x})[0].sum()


class OnePass(nn.Module):
    """A layer or network, trained with `rep_backbones.one_pass`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with one_pass.switched_on():
            return self.inner(x)  # type: ignore[no-any-return]


def measured(device: torch.device, quick: bool, only: str, runs: int | None) -> Findings:
    """Training steps on `device`.

    Args:
        quick: a first look at tiny sizes.
        only: a pattern of the names of blocks and detectors.
        runs: steps of each at most; None for as many as its plan has.

    Raises:
        ValueError: nothing matches.
    """
    plan = PLANS["quick" if quick else device.type]
    plan = replace(plan, runs=runs or plan.runs)
    blocks = [name for name in ours() if fnmatch(name, only)]
    detectors = [name for name in DETECTORS if fnmatch(name, only)]
    if not blocks and not detectors:
        raise ValueError(f"--only {only} matches nothing; there are {', '.join([*ours(), *DETECTORS])}")
    notes = [f"{whose} is not installed: pip install {whose} to compare its blocks" for whose in OTHERS if not _has(whose)]
    layers: list[Row] = []
    with tqdm(total=len(blocks) * len(plan.shapes), desc="layers", unit="comparison") as bar:
        for name in blocks:
            bar.set_postfix_str(name)
            for shape in plan.shapes:
                layers += _layer(name, shape, device, plan)
                bar.update()
    whole: list[Row] = []
    for name in detectors:
        with quiet(), no_downloads():
            forms = DETECTORS[name](notes)
        whole += _detector(name, forms, device, plan)
    return Findings(
        "What branches cost in training",
        _text(layers, whole, plan, device),
        [row.data() for row in (*layers, *whole)],
        _picture(layers, whole, device),
        notes,
    )


def _layer(name: str, shape: Shape, device: torch.device, plan: Plan) -> list[Row]:
    torch.manual_seed(0)
    pictures, channels, size = shape
    layer = LAYERS[name].cls(channels, channels)
    others = {whose: make(channels) for whose, make in TODAY.get(name, {}).items() if _has(whose)}
    if name in FLOORS:
        others[FLOOR] = FLOORS[name](channels)
    if device.type == "cuda":
        others[f"{HERE}, {ONE_PASS}"] = OnePass(copy.deepcopy(layer))
    forms = {TWIN: plain_twin(layer), HERE: layer, **others}
    costs = step_costs(_placed(forms, device), _noise(shape, device, True), plan.runs, seconds=plan.seconds)
    found = [Row(name, whose, shape, cost, costs[TWIN]) for whose, cost in costs.items() if whose != TWIN]
    return [*found, Row(name, OF_FLOOR, shape, costs[HERE], costs[FLOOR])] if name in FLOORS else found


def _detector(name: str, forms: Mapping[str, nn.Module], device: torch.device, plan: Plan) -> list[Row]:
    x = _noise(plan.detectors, device, False)
    models = _placed({form: WithLoss(model, len(x)) for form, model in forms.items()}, device)
    if device.type == "cuda":
        models |= {f"{form}, {ONE_PASS}": OnePass(copy.deepcopy(model)) for form, model in models.items() if form != TWIN}
    with tqdm(total=WARMUP + plan.runs, desc=name, unit="round") as bar:
        costs = step_costs(models, x, plan.runs, WARMUP, plan.detector_seconds, bar.update)
    return [Row(form, HERE, plan.detectors, cost, costs[TWIN]) for form, cost in costs.items() if form != TWIN]


def _efficientrep(notes: list[str]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model: Any = YOLO("efficientrep-n.yaml").model
    return {TWIN: plain_twin(model), "efficientrep-n": model}


def _yolo11(notes: list[str]) -> dict[str, nn.Module]:
    """The plain detector and its expansion by each block; those that cannot expand it are noted."""
    torch.manual_seed(0)
    plain: Any = YOLO("yolo11n.yaml").model
    forms: dict[str, nn.Module] = {TWIN: plain}
    refused = []
    for block in tqdm(ours(), desc="expanding yolo11n", unit="block"):
        try:
            forms[f"yolo11n + {block}"] = expand(plain, block)
        except ExpandError:
            refused.append(block)
    notes.append(f"not for `expand`, so not in yolo11n: {', '.join(refused)}")
    return forms


DETECTORS = {"efficientrep-n": _efficientrep, "yolo11n": _yolo11}


def _placed(forms: Mapping[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    return {name: module.to(device).train() for name, module in forms.items()}


def _noise(shape: Shape, device: torch.device, gradient: bool) -> Tensor:
    pictures, channels, size = shape
    x = torch.rand(pictures, channels, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(device).requires_grad_(gradient)


def _has(whose: str) -> bool:
    return importlib.util.find_spec(whose.lower()) is not None


# ---- the page -------------------------------------------------------------------------------------------------------------


def _text(layers: Sequence[Row], whole: Sequence[Row], plan: Plan, device: torch.device) -> str:
    memory = _memory(device)
    parts = [
        "A training step, forward and backward without the optimizer, in float32 (on a GPU convolutions may compute in "
        "TF32, PyTorch's default). Times and memory are multiples of the plain twin's: the network of the same deployed "
        "form, one convolution with one norm for each multi-branch layer. All that is compared takes steps in turn, each of "
        "them compared with the twin's of the same round; given are the median and, in brackets, the smallest and the "
        f"largest. Memory: {memory}."
    ]
    if any(row.of == OF_FLOOR for row in layers):
        parts.append(f"The row of {OF_FLOOR} holds multiples of the floor's instead, {FLOOR.partition(', ')[2]}, summed.")
    if layers:
        header = ["layer", "of", *(f"time, {_size(shape)}" for shape in plan.shapes), "memory", "steps"]
        cells = [
            [name, of, *(_spread(row.times) for row in rows), f"{max(row.memory for row in rows):.2f}", _steps(rows)]
            for (name, of), rows in _by_label(layers).items()
        ]
        parts += ["## Layers", "Pictures x channels x pixels of a side, in and out.", table(header, cells)]
    if whole:
        header = ["detector", "step, ms", "twin's, ms", "time", f"memory, {_size(plan.detectors)}", "steps"]
        cells = [
            [row.name, *map(_milliseconds, (row.cost, row.twin)), _spread(row.times), f"{row.memory:.2f}", _steps([row])]
            for row in whole
        ]
        parts += ["## Whole detectors", "With Ultralytics' loss for four drawn boxes on each picture.", table(header, cells)]
    return "\n\n".join(parts)


def _picture(layers: Sequence[Row], whole: Sequence[Row], device: torch.device) -> str:
    shapes = list(dict.fromkeys(row.shape for row in layers))
    found = []
    for rows in _by_label([*layers, *whole]).values():
        dots = []
        for row in rows:
            hue = shapes.index(row.shape) if row.shape in shapes else len(shapes)
            what = f"time, {_size(row.shape)}" if row.shape in shapes else "time, whole detector"
            dots.append(Bar(what, statistics.median(row.times), min(row.times), max(row.times), hue))
        dots.append(Bar("memory", max(row.memory for row in rows), hue=7))
        found.append((rows[0].label, dots))
    return charts.dots(found, "step time and memory as multiples of the plain twin's, logarithmic", mark=1.0)


def _by_label(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.name, row.of), []).append(row)
    return found


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return "what PyTorch's allocator holds at most in a step, beyond weights"
    return "the bytes of activations that are kept for the backward"


def _size(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _milliseconds(cost: Cost) -> str:
    return f"{statistics.median(cost.seconds) * 1e3:.0f}"


def _steps(rows: Sequence[Row]) -> str:
    fewest, most = (pick(len(row.cost.seconds) for row in rows) for pick in (min, max))
    return str(most) if fewest == most else f"{fewest} to {most}"

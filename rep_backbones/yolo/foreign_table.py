"""Public models without a rule, fused by measurement alone, beside what their own code leaves, measured.

python tools/foreign_table.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from ultralytics.nn.modules import C2fCIB, Detect, RepC3, RepConv, RepNCSPELAN4, RepVGGDW
from ultralytics.nn.tasks import BaseModel, DetectionModel, RTDETRDetectionModel

from rep_backbones.foreign.cost import cost, tensors_in
from rep_backbones.foreign.fusing import fuse_measured
from rep_backbones.yolo import pages
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.devices import described
from rep_backbones.yolo.pages import ROOT
from rep_backbones.yolo.shuffled import shuffled

TOOL = "tools/foreign_table.py"  # as in the mark of the page
HEADER = (
    "| model | input | affine parts merged | left, with a reason | convolutions | after | by its own code | error in "
    "float64 | of the outputs | CPU seconds |\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Subject:
    """A model, the size of its input `(n, c, h, w)`, and what its own library makes of it."""

    make: Callable[[], nn.Module]
    size: tuple[int, int, int, int]
    by_itself: Callable[[nn.Module], nn.Module]


def _timm(name: str, side: int = 64, **options: Any) -> Subject:
    def make() -> nn.Module:
        import timm  # an extra, which only this tool needs

        made: nn.Module = timm.create_model(name, **options)
        return made

    def by_itself(model: nn.Module) -> nn.Module:
        from timm.utils import reparameterize_model

        made: nn.Module = reparameterize_model(model)
        return made.eval()

    return Subject(make, (1, 3, side, side), by_itself)


def _yolo(name: str) -> Subject:
    kind = RTDETRDetectionModel if name.startswith("rtdetr") else DetectionModel
    return Subject(lambda: kind(f"{name}.yaml", verbose=False), (1, 3, 64, 64), _stock_fuse)


def _block(make: Callable[[int], nn.Module], channels: int = 64) -> Subject:
    return Subject(lambda: make(channels), (1, channels, 20, 20), _stock_fuse)


def _stock_fuse(model: nn.Module) -> nn.Module:
    """What Ultralytics merges in `BaseModel.fuse`, without this package's part in it."""
    made: Any = copy.deepcopy(model)
    for module in [m for m in made.modules() if isinstance(m, (RepConv, RepVGGDW))]:
        module.fuse_convs() if isinstance(module, RepConv) else module.fuse()
        vars(module)["forward"] = module.forward_fuse
    for head in [m for m in made.modules() if isinstance(m, Detect)]:
        vars(head)["fuse"] = lambda: None  # which drops a head that only training needs, and merges nothing
    return made.fuse(verbose=False) if isinstance(made, BaseModel) else made


SUBJECTS: dict[str, Subject] = {
    "timm repvgg_a0": _timm("repvgg_a0"),
    "timm repvgg_a2": _timm("repvgg_a2"),
    "timm mobileone_s0": _timm("mobileone_s0"),
    "timm mobileone_s1": _timm("mobileone_s1"),
    "timm repvit_m0_9": _timm("repvit_m0_9"),
    "timm fastvit_t8": _timm("fastvit_t8"),
    "timm repghostnet_050": _timm("repghostnet_050"),
    "timm levit_conv_128s": _timm("levit_conv_128s", img_size=64),
    "timm efficientvit_m0": _timm("efficientvit_m0", img_size=64),
    "timm efficientvit_b0": _timm("efficientvit_b0"),
    "Ultralytics RepConv": _block(lambda c: RepConv(c, c, bn=True)),
    "Ultralytics RepVGGDW": _block(RepVGGDW),
    "Ultralytics RepC3": _block(lambda c: RepC3(c, c, 3)),
    "Ultralytics RepNCSPELAN4": _block(lambda c: RepNCSPELAN4(c, c, c, c // 2, 1)),
    "Ultralytics C2fCIB": _block(lambda c: C2fCIB(c, c, 1, True, True)),
    "yolov9t": _yolo("yolov9t"),
    "yolov10n": _yolo("yolov10n"),
    "rtdetr-l": _yolo("rtdetr-l"),
}


@dataclass(frozen=True)
class Row:
    """What measuring made of a model.

    Attributes:
        merged, left: parts that were merged, and those that were refused.
        convs: convolutions that run: before, after, and what the model's own library leaves.
        exact: the largest error of a part in float64, as a fraction of a channel's largest value.
        outputs: the largest difference of an output in the model's own type, as a fraction of its largest value.
        seconds: that it took, of all cores together.
    """

    merged: int
    left: int
    convs: tuple[int, int, int]
    exact: float
    outputs: float
    seconds: float


def measure(subject: Subject) -> Row:
    """Fuse a model with random weights and statistics by measurement, and compare."""
    torch.manual_seed(0)
    model = shuffled(subject.make()).eval()
    x = torch.rand(subject.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = list(tensors_in(model(x)))
        own = subject.by_itself(copy.deepcopy(model))
        convs = _convs(model, x), _convs(own, x)
        start = time.process_time()
        fused, found = fuse_measured(model, x)
        seconds = time.process_time() - start
        got = list(tensors_in(fused(x)))
    merged = [f for f in found if f.outcome == "merged"]
    return Row(
        merged=len(merged),
        left=len(found) - len(merged),
        convs=(convs[0], _convs(fused, x), convs[1]),
        exact=max((f.error or 0.0 for f in merged), default=0.0),
        outputs=max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got)),
        seconds=seconds,
    )


def _convs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return cost(lambda: model(x)).convs


def line(name: str, row: Row, size: tuple[int, int, int, int]) -> str:
    """A row of the table."""
    before, after, own = row.convs
    return (
        f"| {name} | {' x '.join(map(str, size[1:]))} | {row.merged} | {row.left} | {before} | {after} | {own} "
        f"| {row.exact:.1e} | {row.outputs:.1e} | {row.seconds:.1f} |"
    )


def table(names: Sequence[str]) -> Iterator[str]:
    yield f"{described('cpu')}, PyTorch {torch.__version__.partition('+')[0]}.\n\n{HEADER}"
    yield from (line(name, measure(SUBJECTS[name]), SUBJECTS[name].size) for name in tqdm(names, unit="model"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and put the table between the marks of docs/foreign.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="foreign_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "foreign.md", help="page with the marks (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="models (default: all)")
    options = parser.parse_args(argv)
    return ended("foreign_table", lambda: _write(options), interrupted="interrupted; the page is as it was")


def _write(options: argparse.Namespace) -> int:
    pages.check(options.out, TOOL)
    pages.fill(options.out, TOOL, "\n".join(table(options.models)))
    return 0

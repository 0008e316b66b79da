"""What `expand` and `fuse` do to real networks, measured: parameters and multiply-adds while training and after, errors.

python tools/expand_table.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from ultralytics.nn.tasks import BaseModel, DetectionModel, RTDETRDetectionModel

from rep_backbones.candidates import ExpandError
from rep_backbones.containers import Concat, Residual, Scale
from rep_backbones.fuse import fuse
from rep_backbones.registry import LAYERS
from rep_backbones.rules import multi_branch
from rep_backbones.verify import verify
from rep_backbones.yolo import pages
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.expanding import expand
from rep_backbones.yolo.shuffled import shuffled

TOOL = "tools/expand_table.py"  # as in the mark of the page
HEADER = (
    "| block | convolutions expanded | parameters training | after | M multiply-adds training | after | error in eval "
    "| in train mode | fused | branches left |\n|---|---|---|---|---|---|---|---|---|---|"
)


def crnet(channels: int = 7) -> nn.Module:
    """A network of the shape of CRNet's (Lu et al., "Multi-resolution CSI Feedback", ICC 2020): 5x5 in front, then blocks of
    3x3, 1x9, 9x1 beside 1x5, 5x1 with a shortcut."""

    def layer(c1: int, c2: int, k: tuple[int, int]) -> nn.Sequential:
        conv = nn.Conv2d(c1, c2, k, padding=(k[0] // 2, k[1] // 2), bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c2), nn.LeakyReLU(0.3))

    def block() -> nn.Module:
        wide = [layer(2, channels, (3, 3)), layer(channels, channels, (1, 9)), layer(channels, channels, (9, 1))]
        narrow = [layer(2, channels, (1, 5)), layer(channels, channels, (5, 1))]
        body = nn.Sequential(Concat([nn.Sequential(*wide), nn.Sequential(*narrow)]), layer(2 * channels, 2, (1, 1)))
        return Residual(body, nn.Identity())

    return nn.Sequential(layer(2, 2, (5, 5)), block(), block())


def _yolo(name: str) -> Callable[[], nn.Module]:
    kind = RTDETRDetectionModel if name.startswith("rtdetr") else DetectionModel
    return lambda: kind(f"{name}.yaml", verbose=False)


@dataclass(frozen=True)
class Subject:
    """A network: how it is made, the pictures that errors are measured on, and the one that multiply-adds are counted on."""

    make: Callable[[], nn.Module]
    tried: tuple[int, ...]
    counted: tuple[int, ...]


SUBJECTS = {
    **{
        name: Subject(_yolo(name), (1, 3, 64, 96), (1, 3, 640, 640)) for name in ("yolov8n", "yolo11n", "yolo12n", "yolo26n")
    },
    "rtdetr-l": Subject(_yolo("rtdetr-l"), (2, 3, 160, 160), (1, 3, 640, 640)),
    "ResNet-50": Subject(torchvision.models.resnet50, (2, 3, 64, 96), (1, 3, 224, 224)),
    "MobileNetV3-L": Subject(torchvision.models.mobilenet_v3_large, (2, 3, 64, 96), (1, 3, 224, 224)),
    "a CRNet": Subject(crnet, (2, 2, 32, 32), (1, 2, 32, 32)),
}


@dataclass(frozen=True)
class Measured:
    """One network expanded by one block; parameters and multiply-adds while training and after fusing, errors as fractions
    of each output's range."""

    block: str
    expanded: int
    parameters: tuple[int, int]
    multiply_adds: tuple[float, float]
    in_eval: float
    in_train: float
    fused: float
    left: int

    def row(self) -> str:
        p, m = self.parameters, self.multiply_adds
        errors = " | ".join("0" if e == 0 else f"{e:.0e}" for e in (self.in_eval, self.in_train, self.fused))
        counts = f"{p[0]:,} | {p[1]:,} | {m[0] / 1e6:,.1f} | {m[1] / 1e6:,.1f}"
        return f"| {self.block} | {self.expanded} | {counts} | {errors} | {self.left} |"


def network(subject: Subject) -> nn.Module:
    """The network with random statistics in its norms, and final layers whose outputs a wrong kernel can't hide behind."""
    torch.manual_seed(0)
    model = shuffled(subject.make()).eval()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None and ".cv" in path:
                module.weight.normal_(0, 0.1)
                module.bias.zero_()
    return model


def deployed(model: nn.Module) -> nn.Module:
    """The network as it is deployed: by Ultralytics' own fuse for its models, by ours for others."""
    if isinstance(model, BaseModel):
        return copy.deepcopy(model).fuse(verbose=False)
    return fuse(model)


def measure(plain: nn.Module, block: str, subject: Subject, tolerance: float = 1e-5) -> Measured:
    """Expand `plain` by `block`, and compare it before, in train mode and after fusing.

    Raises:
        ExpandError: the block fits no convolution of the network.
    """
    torch.manual_seed(1)  # the new branches' kernels: the same whichever blocks came before
    model = expand(plain, block)
    x = torch.rand(*subject.tried, generator=torch.Generator().manual_seed(1))
    once, again = copy.deepcopy(plain).train(), copy.deepcopy(model).train()
    in_train = verify(_seen(once), _seen(again), [x], tolerance=tolerance).error
    fused, loud = deployed(model), _loud(copy.deepcopy(model))
    return Measured(
        block,
        len(multi_branch(model)) - len(multi_branch(plain)),
        (_parameters(model), _parameters(fused)),
        (_multiply_adds(model, subject), _multiply_adds(fused, subject)),
        verify(_seen(plain), _seen(model), [x], tolerance=tolerance).error,
        in_train,
        verify(_seen(loud), _seen(deployed(loud)), [x], tolerance=tolerance).error,
        len(multi_branch(fused)),
    )


def _loud(model: nn.Module) -> nn.Module:
    """The model with branches that speak, as trained ones do: random statistics and scales."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in shuffled(model).modules():
            if isinstance(module, Scale):
                module.alpha.normal_(0, 0.5)
    return model


def _seen(model: nn.Module) -> Callable[[Tensor], Any]:
    """What is compared: the outputs, but where they are sorted, and so jump with the last bit, what stands before: what
    enters RT-DETR's decoder, and a YOLO head's maps, of whose two sets the fused form may keep one.
    """

    layers: Any = model.model if isinstance(model, BaseModel) else [None]
    head = layers[-1]

    def run(x: Tensor) -> Any:
        seen: list[Any] = []
        hooks = []
        if isinstance(model, RTDETRDetectionModel):
            hooks.append(head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout draws the same numbers on both sides
            out = model(x)
        for hook in hooks:
            hook.remove()
        raw = out[1] if isinstance(out, tuple) and isinstance(out[1], dict) else {}
        if "one2many" in raw:
            return raw["one2one" if head.end2end else "one2many"]
        return seen or raw or out

    return run


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _multiply_adds(model: nn.Module, subject: Subject) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(*subject.counted))
    return counter.get_total_flops() / 2


def tables(names: Sequence[str], blocks: Sequence[str]) -> Iterator[str]:
    """A Markdown table for each network, and behind them the blocks that fit no convolution, with the reason."""
    bar = tqdm(total=len(names) * len(blocks), unit="network")
    refused: dict[str, dict[str, None]] = {}  # reason -> blocks, in order
    for name in names:
        subject = SUBJECTS[name]
        plain = network(subject)
        as_deployed = deployed(plain)
        size = "x".join(map(str, subject.counted[2:]))
        cost = f"{_parameters(as_deployed):,} parameters, {_multiply_adds(as_deployed, subject) / 1e6:,.1f} M multiply-adds"
        lines = [f"### {name}", "", f"Plain, as deployed: {cost} at {size}.", "", HEADER]
        for block in blocks:
            bar.set_description(f"{name} {block}")
            try:
                lines.append(measure(plain, block, subject).row())
            except ExpandError as error:
                refused.setdefault(str(error).partition(": ")[2].replace(block, "it"), {})[block] = None
            bar.update()
        yield "\n".join(lines)
    bar.close()
    if refused:
        yield "\n".join(["### Refused", "", *(f"- {', '.join(those)}: {reason}." for reason, those in refused.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and put the tables between the two marks of docs/expand.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="expand_table.py", description=(__doc__ or "").splitlines()[0])
    page = pages.ROOT / "docs" / "expand.md"
    parser.add_argument("--out", type=Path, default=page, help="file with the marks (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="networks (default: all)")
    parser.add_argument("--blocks", nargs="+", choices=sorted(LAYERS), default=sorted(LAYERS), help="blocks (default: all)")
    options = parser.parse_args(argv)
    return ended("expand_table", lambda: _write(options), interrupted="interrupted; nothing was written")


def _write(options: argparse.Namespace) -> int:
    pages.check(options.out, TOOL)
    pages.fill(options.out, TOOL, "\n\n".join(tables(options.models, options.blocks)))
    return 0

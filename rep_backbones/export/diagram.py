"""Pictures of layers: branches side by side, what is in series from top to bottom, as the containers hold them.

The picture is drawn from the module itself, so it shows what is computed, also of a layer that a user wrote. Types are
looked up in two visible tables, `LABELS` for single layers and `SHAPES` for containers; all else is a box with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from torch import nn

from rep_backbones.affine import pair
from rep_backbones.containers import (
    Concat,
    Filter,
    Gate,
    PaddedBatchNorm2d,
    Parallel,
    PoolPyramid,
    Residual,
    Scale,
    Split,
    Subsample,
    runs_in_series,
)
from rep_backbones.export.files import replacing
from rep_backbones.online import Online
from rep_backbones.rules import seen_as

INCH = 0.42  # of one unit
HEIGHT, GAP, MARGIN = 0.62, 0.3, 0.35  # of a box, between boxes, around branches; in units
CHARACTER = 0.135  # width of one, in units
CONV, NORM, OTHER, LINE, FAINT = "#cfe3f7", "#e4f2df", "#f6ead2", "#333333", "#777777"

# text stays text and is nobody's formula, and the file is the same for the same layers
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rep_backbones",
    "font.family": "sans-serif",
    "text.parse_math": False,
}

Paint = Callable[[Axes, float, float], None]


@dataclass(frozen=True)
class Drawing:
    """What is drawn below a point: `paint(axes, x of the middle, y of the top)`; y falls by `height`."""

    width: float
    height: float
    paint: Paint


def drawing(module: nn.Module) -> Drawing:
    """The drawing of a layer."""
    module = seen_as(module)
    if shape := SHAPES.get(type(module)):
        return shape(module)
    if label := LABELS.get(type(module)):
        return _box(*label(module))
    if runs_in_series(module):
        return _series([drawing(child) for child in module.children()])
    return _box(_readable(type(module).__name__), OTHER)


def save(path: Path, forms: Sequence[tuple[str, nn.Module]]) -> None:
    """Draw layers beside each other, each with its title, an arrow between them; SVG or PNG by the name of the file.

    Raises:
        TargetError: `path` cannot be written.
    """
    kind = path.suffix[1:]
    with replacing(path) as temporary, temporary.open("wb") as stream:
        draw(stream, forms, kind)


def draw(stream: IO[bytes], forms: Sequence[tuple[str, nn.Module]], kind: str = "svg", *, transparent: bool = False) -> None:
    """The same into an open file, as "svg" or "png", on white paper or on none."""
    drawn = [(title, drawing(module)) for title, module in forms]
    widths = [max(d.width, len(title) * CHARACTER * 1.2) for title, d in drawn]
    between = 1.6
    width, height = sum(widths) + between * (len(drawn) - 1) + 0.6, max(d.height for _, d in drawn) + 2.3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * INCH, height * INCH))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(-height, 0))
        axes.axis("off")
        left = 0.3
        for index, ((title, d), wide) in enumerate(zip(drawn, widths)):
            middle = left + wide / 2
            axes.text(middle, -0.45, title, ha="center", va="center", fontsize=9, weight="bold", color=LINE)
            _line(axes, middle, -0.85, middle, -1.25)
            d.paint(axes, middle, -1.25)
            _arrow(axes, middle, -1.25 - d.height, middle, -1.65 - d.height)
            left += wide
            if index + 1 < len(drawn):
                _arrow(axes, left + 0.25, -0.45, left + between - 0.25, -0.45)
                axes.text(left + between / 2, -0.3, "fuse", ha="center", fontsize=8, color=FAINT)
            left += between
        about = {"Date": None} if kind == "svg" else None
        figure.savefig(stream, format=kind, metadata=about, dpi=160, transparent=transparent)


# ---- what layers are called -----------------------------------------------------------------------------------------------


def _conv(m: nn.Conv2d) -> tuple[str, str]:
    (kh, kw), stride = pair(m.kernel_size), pair(m.stride)
    kind = "" if m.groups == 1 else " depthwise" if m.groups == m.in_channels else f" in {m.groups} groups"
    d = "" if pair(m.dilation) == (1, 1) else f", dilation {_short(pair(m.dilation))}"
    return f"{kh}×{kw}{kind}{d}" + ("" if stride == (1, 1) else f", stride {_short(stride)}"), CONV


def _short(value: tuple[int, int]) -> str:
    return str(value[0]) if value[0] == value[1] else f"{value[0]}, {value[1]}"


def _readable(name: str) -> str:
    return name.removesuffix("2d")


def _average(m: nn.AvgPool2d) -> tuple[str, str]:
    if pair(m.kernel_size) == (1, 1):
        return f"stride {_short(pair(m.stride))}", OTHER
    return f"{'×'.join(map(str, pair(m.kernel_size)))} average", OTHER


def _pad(m: nn.ZeroPad2d) -> tuple[str, str]:
    left, _, top, _ = m.padding
    return f"{'pad' if max(left, top) > 0 else 'crop'} {_short((abs(top), abs(left)))}", OTHER


LABELS: dict[type[nn.Module], Callable[[Any], tuple[str, str]]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: lambda m: ("BN", NORM),
    nn.SyncBatchNorm: lambda m: ("BN", NORM),
    PaddedBatchNorm2d: lambda m: (f"BN, padded by {_short(m.padding)}", NORM),
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: lambda m: ("global average", OTHER),
    nn.ZeroPad2d: _pad,
    Filter: lambda m: (f"{'×'.join(map(str, m.kernel.shape[2:]))} fixed filter", OTHER),
    Scale: lambda m: ("scale" if m.alpha.numel() == 1 else "scale per channel", NORM),
    Subsample: lambda m: (f"stride {_short(pair(m.stride))}", OTHER),
    PoolPyramid: lambda m: (f"max poolings {m.pool.kernel_size}, concatenated", OTHER),
}


# ---- how containers are laid out ------------------------------------------------------------------------------------------


def _box(text: str, colour: str) -> Drawing:
    width = len(text) * CHARACTER + 0.45

    def paint(axes: Axes, x: float, y: float) -> None:
        corner = (x - width / 2, y - HEIGHT)
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle=style, fc=colour, ec=LINE, lw=0.8))
        axes.text(x, y - HEIGHT / 2, text, ha="center", va="center", fontsize=8, color=LINE)

    return Drawing(width, HEIGHT, paint)


def _wire(_: nn.Module | None = None) -> Drawing:
    return Drawing(0.4, HEIGHT, lambda axes, x, y: _line(axes, x, y, x, y - HEIGHT))


def _series(parts: Sequence[Drawing]) -> Drawing:
    if not parts:
        return _wire()
    height = sum(part.height for part in parts) + GAP * (len(parts) - 1)

    def paint(axes: Axes, x: float, y: float) -> None:
        for index, part in enumerate(parts):
            part.paint(axes, x, y)
            y -= part.height
            if index + 1 < len(parts):
                _line(axes, x, y, x, y - GAP)
            y -= GAP

    return Drawing(max(part.width for part in parts), height, paint)


def _joined(named: Sequence[tuple[str, Drawing]], joint: str, frame: str = "") -> Drawing:
    """Branches on one input, each under its name, that meet in `joint`: "+", "×", or a word for a box."""
    columns = [max(part.width, len(name) * CHARACTER * 0.9) + 2 * MARGIN for name, part in named]
    tallest = max(part.height for _, part in named)
    meeting: Drawing = _dot(joint) if len(joint) == 1 else _box(joint, OTHER)
    width = max(sum(columns), meeting.width)
    head, foot = 0.75, 0.35

    def paint(axes: Axes, x: float, y: float) -> None:
        centres, left = [], x - sum(columns) / 2
        for column in columns:
            centres.append(left + column / 2)
            left += column
        top, bottom = y - 0.2, y - head - tallest - foot
        _line(axes, x, y, x, top)
        for (name, part), centre in zip(named, centres):
            _line(axes, centre, top, centre, y - head)
            axes.text(centre + 0.1, top - 0.26, name, ha="left", va="center", fontsize=6.5, color=FAINT)
            part.paint(axes, centre, y - head)
            _line(axes, centre, y - head - part.height, centre, bottom)
        for level in (top, bottom):
            _line(axes, min([*centres, x]), level, max([*centres, x]), level)
        _line(axes, x, bottom, x, bottom - 0.15)
        meeting.paint(axes, x, bottom - 0.15)
        if frame:
            size = (width + 0.3, head + tallest + foot + 0.3 + meeting.height)
            corner = (x - size[0] / 2, y - size[1] + 0.05)
            axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0", fc="none", ec=FAINT, lw=0.8, ls="--"))
            axes.text(corner[0] + 0.15, corner[1] + 0.22, frame, fontsize=6.5, color=FAINT, va="center")

    return Drawing(width + 0.3 * bool(frame), head + tallest + foot + 0.15 + meeting.height, paint)


def _dot(sign: str) -> Drawing:
    radius = 0.24

    def paint(axes: Axes, x: float, y: float) -> None:
        axes.add_patch(Circle((x, y - radius), radius, fc="white", ec=LINE, lw=0.8))
        axes.text(x, y - radius - 0.01, sign, ha="center", va="center", fontsize=9, color=LINE)

    return Drawing(2 * radius, 2 * radius, paint)


def _branches(module: Parallel, frame: str = "") -> Drawing:
    return _joined([(name, drawing(branch)) for name, branch in module.items()], "+", frame)


def _online(module: Online) -> Drawing:
    kind = "one convolution, its kernel folded in each forward"
    return _branches(module.branches, kind) if isinstance(module.branches, Parallel) else drawing(module.branches)


SHAPES: dict[type[nn.Module], Callable[[Any], Drawing]] = {
    Parallel: _branches,
    Online: _online,
    nn.Identity: _wire,
    Concat: lambda m: _joined([("", drawing(part)) for part in m.parts], "concatenate"),
    Residual: lambda m: _joined([("body", drawing(m.body)), ("shortcut", drawing(m.shortcut))], "+"),
    Gate: lambda m: _joined([("", _wire()), ("gate", drawing(m.gate))], "×"),
    Split: lambda m: _joined([("first half", drawing(m.body)), ("second half", _wire())], "concatenate"),
}


def _line(axes: Axes, x1: float, y1: float, x2: float, y2: float) -> None:
    axes.plot([x1, x2], [y1, y2], color=LINE, lw=0.9, solid_capstyle="round")


def _arrow(axes: Axes, x1: float, y1: float, x2: float, y2: float) -> None:
    axes.annotate("", (x2, y2), (x1, y1), arrowprops={"arrowstyle": "-|>", "color": LINE, "lw": 0.9})

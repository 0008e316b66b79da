"""The charts of the HTML report and of the benchmarks. Long lists grow downwards, so that they can be scrolled; one unit of
height is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rep_backbones.export.svg import BAD, FAINT, GOOD, GRID, HUES, INK, figure

WIDTH, ROW, TOP, CHARACTER = 4.3, 0.2, 0.27, 0.075  # inches
LONGEST = 22  # characters of a label; the tables have all of it
WIDE, LONG = 7.0, 40  # the same of a page that is as wide as a screen
EXACT = 1e-10  # where a difference of zero is drawn on a logarithmic axis


@dataclass(frozen=True)
class Bar:
    """One bar: a value, what it varied between, and which form it belongs to (an index of a colour)."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    hue: int = 0


def errors(found: Sequence[tuple[str, float | None, bool]], tolerance: float, title: str) -> str:
    """A dot for the error of each name on a logarithmic axis, and the line of what is accepted.

    Args:
        found: name, error as a fraction of a range (None or infinite: not comparable), whether it is accepted.
    """

    def paint(axes: Axes) -> None:
        values = [_drawable(error) for _, error, _ in found]
        right = max([tolerance, *values]) * 4
        for colour, wanted in ((GOOD, True), (BAD, False)):
            chosen = [row for row, (_, _, ok) in enumerate(found) if bool(ok) is wanted]
            ends = [values[row] for row in chosen]
            axes.hlines(chosen, EXACT / 10, ends, color=colour, lw=1.2, alpha=0.45)
            axes.plot(ends, chosen, "o", color=colour, ms=4)
        for row, (_, error, ok) in enumerate(found):
            said = "none" if error is None or not math.isfinite(error) else "0" if error == 0 else f"{error:.0e}"
            axes.text(right * 2, row, said, va="center", fontsize=7.5, color=FAINT if ok else BAD)
        axes.axvline(tolerance, color=BAD, ls="--", lw=1)
        axes.set(xscale="log", xlim=(EXACT / 2, right))
        powers = range(-10, math.floor(math.log10(right)) + 1, 2)
        axes.set_xticks([10.0**power for power in powers], [f"1e{power}" for power in powers])
        axes.minorticks_off()

    return _rows([name for name, _, _ in found], paint, title, margin=0.62)


def shares(found: Mapping[str, Mapping[str, float | None]], kinds: Sequence[str], title: str) -> str:
    """A stacked bar for each layer: the share of each branch; the colour is that of its name's place in `kinds`."""

    def paint(axes: Axes) -> None:
        start = [0.0] * len(found)
        for hue, kind in enumerate(kinds):
            widths = [_nothing(branches.get(kind)) for branches in found.values()]
            _blocks(axes, start, widths, 0.74, [HUES[hue % len(HUES)]])
            start = [left + width for left, width in zip(start, widths)]
        axes.set(xlim=(0, 1))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])

    return _rows(list(found), paint, title)


def bars(found: Sequence[Bar], unit: str, title: str, start: float = 0.0) -> str:
    """A bar for each form with its value behind it, and a line between the smallest and the largest where they are known.

    Args:
        unit: how a value is written, such as "{:.1f} ms".
        start: of the axis; bars below it point to the left.
    """
    shown = [bar for bar in found if math.isfinite(bar.value)]

    def paint(axes: Axes) -> None:
        ends = [bar.value if bar.high is None else bar.high for bar in shown]
        lowest = min([start, *(bar.value for bar in shown)])
        span = (max([start, *ends]) - lowest) or 1.0
        colours = [HUES[bar.hue % len(HUES)] for bar in shown]
        _blocks(axes, [start] * len(shown), [bar.value - start for bar in shown], 0.66, colours)
        for row, bar in enumerate(shown):
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], "|-", color=INK, lw=1, ms=5)
            axes.text(max(ends[row], start) + span * 0.02, row, unit.format(bar.value), va="center", fontsize=8, color=INK)
        axes.set(xlim=(lowest, lowest + span * 1.25))
        axes.locator_params(axis="x", nbins=5)

    return _rows([bar.label for bar in shown], paint, title, row=0.27)


def dots(
    found: Sequence[tuple[str, Sequence[Bar]]], title: str, *, mark: float | None = None, logarithmic: bool = True
) -> str:
    """A row of dots for each name, each with a line between its smallest and its largest value.

    Args:
        found: name, and its dots, whose `label` says what they are: one colour each, named below the chart.
        title: what is measured.
        mark: where a line is drawn.
        logarithmic: the axis; its values must be positive then.
    """
    kinds = {bar.label: bar.hue for _, bars in found for bar in bars}
    values = [v for _, bars in found for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None]
    low, high = min([*values, math.inf if mark is None else mark]), max([*values, -math.inf if mark is None else mark])
    air = 0.05 * ((high - low) or 1.0)
    low, high = (low / 1.1, high * 1.1) if logarithmic else (low - air, high + air)

    def paint(axes: Axes) -> None:
        for row, (_, bars) in enumerate(found):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.35, lw=0)
            for index, bar in enumerate(bars):
                place = row + (index - (len(bars) - 1) / 2) * 0.8 / max(len(kinds), 1)
                colour = HUES[bar.hue % len(HUES)]
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [place, place], color=colour, lw=1, alpha=0.6)
                axes.plot([bar.value], [place], "o", color=colour, ms=3.5)
        if mark is not None:
            axes.axvline(mark, color=INK, ls="--", lw=0.8)
        axes.set(xscale="log" if logarithmic else "linear", xlim=(low, high))
        if not logarithmic:
            return
        steps = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)
        ticks = [step * 10.0**power for power in range(-3, 6) for step in steps if low <= step * 10.0**power <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()

    rows = [name for name, _ in found]
    return _rows(rows, paint, title, row=max(ROW, 0.06 + 0.09 * len(kinds)), width=WIDE, longest=LONG, legend=kinds)


def _rows(
    labels: Sequence[str],
    paint: Callable[[Axes], None],
    title: str,
    *,
    row: float = ROW,
    margin: float = 0.24,
    width: float = WIDTH,
    longest: int = LONGEST,
    legend: Mapping[str, int] | None = None,
) -> str:
    """A chart with one row for each label, the first on top, its axis above, and `margin` inches on its right; below, its
    title and what the colours mean, if there is a `legend`: name -> index of its colour.
    """
    count = max(len(labels), 1)
    short = [_short(label, longest) for label in labels]
    foot = 0.06 + (ROW * (math.ceil(len(legend) / 2) + 1.5) if legend else 0.0)  # half a row of air
    height = TOP + count * row + foot + 0.02
    left = 0.16 + CHARACTER * max(map(len, short), default=0)

    def arrange(drawn: Figure) -> None:
        axes: Any = drawn.add_axes((left / width, foot / height, 1 - (left + margin) / width, count * row / height))
        if legend:
            style: Any = {"marker": "o", "ls": "", "ms": 4}
            handles = [Line2D([], [], color=HUES[hue % len(HUES)], label=name, **style) for name, hue in legend.items()]
            drawn.legend(
                handles=handles,
                loc="lower left",
                ncols=2,
                frameon=False,
                fontsize=8,
                labelcolor=INK,
                title=title,
                title_fontproperties={"size": 8},
                alignment="left",
            ).get_title().set_color(INK)
        axes.patch.set_alpha(0)
        paint(axes)
        axes.set_ylim(count - 0.5, -0.5)
        for place, label in enumerate(short):  # ticks take ten times as long
            axes.text(
                -0.06 / (width - left - margin),
                place,
                label,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=8,
                color=INK,
            )
        axes.yaxis.set_visible(False)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", colors=FAINT, labelsize=8, length=0)
        axes.grid(axis="x", color=GRID, lw=0.7)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return figure(width, height, arrange, title)


def _drawable(error: float | None) -> float:
    return 1.0 if error is None or not math.isfinite(error) else min(max(error, EXACT), 1.0)


def _blocks(axes: Axes, lefts: Sequence[float], widths: Sequence[float], height: float, colours: Sequence[str]) -> None:
    """A bar in each row, all as one artist: a hundred of them one by one take seconds."""
    corners = [
        [
            (left, row - height / 2),
            (left + width, row - height / 2),
            (left + width, row + height / 2),
            (left, row + height / 2),
        ]
        for row, (left, width) in enumerate(zip(lefts, widths))
    ]
    axes.add_collection(PolyCollection(corners, facecolors=list(colours), linewidths=0), autolim=False)


def _nothing(share: float | None) -> float:
    return share if share is not None and math.isfinite(share) else 0.0


def _short(label: str, longest: int) -> str:
    return label if len(label) <= longest else f"{label[: longest // 2 - 1]}…{label[-longest // 2 :]}"

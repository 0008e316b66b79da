"""Pictures of matplotlib as SVG to stand inside an HTML page, in the page's own colours, light and dark; or alone.

Matplotlib knows no CSS. So what is drawn in one of the colours of `THEME` gets the page's variable in place of it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.figure import Figure
from torch import nn

from rep_backbones.export import diagram

INK, FAINT, GRID, GOOD, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
HUES = tuple(f"#0601{index:02x}" for index in range(8))  # of branches and forms

THEME = {  # a colour -> a variable of report.css
    INK: "ink",
    FAINT: "faint",
    GRID: "line",
    GOOD: "good",
    BAD: "bad",
    **{hue: f"hue{index}" for index, hue in enumerate(HUES)},
    diagram.LINE: "ink",
    diagram.FAINT: "faint",
    diagram.CONV: "conv",
    diagram.NORM: "norm",
    diagram.OTHER: "other",
    "#ffffff": "paper",
}


def figure(width: float, height: float, paint: Callable[[Figure], None], title: str) -> str:
    """What `paint` draws on a figure of so many inches; `title` is read out in place of it."""
    with matplotlib.rc_context({**diagram.STYLE, "font.size": 9}):
        drawn = Figure(figsize=(width, height))
        drawn.patch.set_alpha(0)
        paint(drawn)
        return _inline(lambda stream: drawn.savefig(stream, format="svg", metadata={"Date": None}), title)


def layers(forms: Sequence[tuple[str, nn.Module]], title: str) -> str:
    """Layers beside each other, as `diagram.save` draws them."""
    return _inline(lambda stream: diagram.draw(stream, forms, transparent=True), title)


def alone(picture: str) -> str:
    """A picture of `figure` as a file of its own, on white paper: a page's variables, in their light colours, are put in."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w+)", style[: style.index("@media")]))
    text = re.sub(r"var\(--([\w-]+)\)", lambda found: light[found[1]], picture)
    paper = f'<rect width="100%" height="100%" fill="{light["paper"]}"/>'
    return '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"(<svg [^>]*>)", rf"\1{paper}", text, count=1)


def _inline(write: Callable[[IO[bytes]], object], title: str) -> str:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has the letters that matplotlib's font lacks
        write(stream)
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :]
    # a style rule would be one for the whole page, and names such as patch_1 are those of each picture
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| id=\"[\w.]+_\d+\"", "", text, flags=re.DOTALL)
    text = re.sub("#[0-9a-f]{6}", lambda found: _themed(found[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _themed(colour: str) -> str:
    return f"var(--{THEME[colour]})" if colour in THEME else colour

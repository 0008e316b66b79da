"""The pictures and the table of docs/blocks.md: each block as it is built, and what it costs in training, measured.

python tools/block_pages.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from rep_backbones.export import diagram
from rep_backbones.export.files import writable_folder
from rep_backbones.fuse import fuse
from rep_backbones.registry import LAYERS, ours
from rep_backbones.yolo import pages
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.devices import machine
from rep_backbones.yolo.training_cost import plain_twin, step_costs

TOOL = "tools/block_pages.py"
BATCH, CHANNELS, SIZE = 8, 64, 40
HEADER = (
    "| block | parameters training | deployed | step time | smallest to largest | activations kept |\n" + "|---" * 6 + "|"
)


def draw(name: str, folder: Path) -> Path:
    """The picture of a block with default arguments, in training and deployed."""
    target = folder / f"{name}.svg"
    layer = LAYERS[name].cls(CHANNELS, CHANNELS).eval()
    diagram.save(target, [(name, layer), ("deployed", fuse(layer))])
    return target


def row(name: str, x: torch.Tensor, repeats: int) -> str:
    """A block beside its plain twin: times and bytes as multiples of the twin's."""
    torch.manual_seed(0)
    layer = LAYERS[name].cls(CHANNELS, CHANNELS).train()
    deployed = sum(p.numel() for p in fuse(layer.eval()).parameters())
    twin = plain_twin(layer)
    costs = step_costs({"layer": layer, "twin": twin}, x, repeats)
    times, kept = costs["layer"].times(costs["twin"]), costs["layer"].memory(costs["twin"])
    parameters = sum(p.numel() for p in layer.parameters())
    time = f"{statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f}"
    return f"| [{name}](#{name.lower()}) | {parameters:,} | {deployed:,} | {time} | {kept:.2f} |"


def table(names: Sequence[str], repeats: int) -> Iterator[str]:
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    setting = f"{CHANNELS} channels in and out, {BATCH} pictures of {SIZE} x {SIZE}, float32, {machine()}"
    yield (
        f"{setting}, median of {repeats} steps "
        "in turn. Times and activations are multiples of the plain twin's: the layer of the same deployed form, each of its "
        f"convolutions with one norm.\n\n{HEADER}"
    )
    yield from (row(name, x, repeats) for name in tqdm(names, unit="block"))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, measure, and put the table between the marks of docs/blocks.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="block_pages.py", description=(__doc__ or "").splitlines()[0])
    page = pages.ROOT / "docs" / "blocks.md"
    parser.add_argument("--out", type=Path, default=page, help="page with the marks (%(default)s)")
    parser.add_argument("--blocks", nargs="+", choices=ours(), default=ours(), help="blocks (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each (default: 15)")
    options = parser.parse_args(argv)
    return ended("block_pages", lambda: _write(options), interrupted="interrupted; the page is as it was")


def _write(options: argparse.Namespace) -> int:
    pages.check(options.out, TOOL)
    pictures = writable_folder(options.out.parent / "pictures" / "blocks")
    for name in options.blocks:
        draw(name, pictures)
    pages.fill(options.out, TOOL, "\n".join(table(options.blocks, max(options.repeats, 1))))
    return 0

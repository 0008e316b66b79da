"""The table of docs/training.md: what each form of a block's branches costs in a training step, side by side in one run.

python tools/training_forms.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from rep_backbones.backbones import create_backbone
from rep_backbones.gradient_form import to_gradient
from rep_backbones.online_form import to_online
from rep_backbones.registry import LAYERS
from rep_backbones.rep_optimizers import RepSGD
from rep_backbones.rules import FoldError
from rep_backbones.yolo import pages
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.devices import at_hand, machine
from rep_backbones.yolo.pages import ROOT
from rep_backbones.yolo.training_cost import Cost, plain_twin, step_costs

TOOL = "tools/training_forms.py"
BLOCKS = ("RepVGGBlock", "ACBlock", "MobileOneBlock", "DiverseBranchBlock", "DilatedReparamBlock")
TRUNKS = ("repvgg_a0", "efficientrep_n")
SHAPES = ((8, 32, 80), (8, 64, 40), (8, 128, 20))  # pictures, channels, size
PICTURES = (8, 3, 160)  # of whole trunks
PLAIN, FORMS = "plain", ("branches", "online", "gradient")
HEADER = (
    "| layer | pictures, channels, size | branches | online | gradient | activations kept: branches | online | gradient |\n"
    + "|---" * 8
    + "|"
)


def forms(layer: nn.Module) -> dict[str, nn.Module]:
    """A layer in each form that it has, and its plain twin, all in train mode."""
    made = {PLAIN: plain_twin(copy.deepcopy(layer)), "branches": layer, "online": to_online(layer)}
    try:
        made["gradient"] = to_gradient(layer)
    except FoldError:  # kernels in series
        pass
    return {name: form.train() for name, form in made.items()}


def optimizer_for(name: str, model: nn.Module) -> Optimizer:
    """What trains a form, with a learning rate that changes nothing."""
    options = {"lr": 0.0, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    if name == "gradient":
        return RepSGD(model.parameters(), model=model, **options)
    return SGD(model.parameters(), **options)  # type: ignore[arg-type]


def ratios(costs: dict[str, Cost], name: str) -> list[float]:
    """Each step of a form as a multiple of the plain one of the same round."""
    return [seconds / plain for seconds, plain in zip(costs[name].seconds, costs[PLAIN].seconds)]


def row(label: str, layer: nn.Module, x: Tensor, repeats: int) -> str:
    models = forms(layer)
    costs = step_costs(models, x, repeats, optimizers={name: optimizer_for(name, model) for name, model in models.items()})
    times, kept = [], []
    for name in FORMS:
        if name not in costs:
            times.append("none")
            kept.append("none")
            continue
        found = ratios(costs, name)
        low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        times.append(f"**{statistics.median(found):.2f}** ({low:.2f} to {high:.2f})")
        kept.append(f"{costs[name].saved / costs[PLAIN].saved:.2f}")
    return f"| {label} | {x.shape[0]}, {x.shape[1]}, {x.shape[2]} | {' | '.join(times)} | {' | '.join(kept)} |"


def table(blocks: Sequence[str], trunks: Sequence[str], repeats: int) -> Iterator[str]:
    place = machine(at_hand("cpu"))
    yield (
        f"Float32 on {place}, {torch.get_num_threads()} of them used, median (and quartiles) over {repeats} rounds, in each "
        "of which all forms make one step in turn: forward, backward and SGD with momentum, or RepSGD. Multiples of "
        f"the plain twin's step of the same round. Other programs ran on the machine.\n\n{HEADER}"
    )
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for name in tqdm(blocks, unit="block"):
        for n, c, size in SHAPES:
            yield row(name, LAYERS[name].cls(c, c), torch.randn(n, c, size, size, generator=draw).requires_grad_(), repeats)
    for name in tqdm(trunks, unit="trunk"):
        n, c, size = PICTURES
        yield row(name, create_backbone(name, 10), torch.randn(n, c, size, size, generator=draw).requires_grad_(), repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and put the table between the marks of docs/training.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="training_forms.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "training.md", help="page with the marks (%(default)s)")
    parser.add_argument("--blocks", nargs="*", choices=sorted(LAYERS), default=BLOCKS, help="blocks (default: five)")
    parser.add_argument("--trunks", nargs="*", default=TRUNKS, help="names of list_backbones() (default: two)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each (default: 15)")
    options = parser.parse_args(argv)
    return ended("training_forms", lambda: _write(options), interrupted="interrupted; the page is as it was")


def _write(options: argparse.Namespace) -> int:
    pages.check(options.out, TOOL)
    pages.fill(options.out, TOOL, "\n".join(table(options.blocks, options.trunks, max(options.repeats, 1))))
    return 0

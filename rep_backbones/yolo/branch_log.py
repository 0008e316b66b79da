"""What a training leaves behind about its branches: `branches.csv` and `branches.png` in the run's folder.

One row per validation: the error between the multi-branch and the fused form of the EMA on fixed pictures, and each branch's
share of the kernel that its layer is equivalent to.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rep_backbones.export.files import replacing
from rep_backbones.fuse import fuse
from rep_backbones.rules import branch_values, multi_branch
from rep_backbones.verify import verify

CSV, PNG = "branches.csv", "branches.png"
FIRST = ("epoch", "fuse_error", "worst_output")
TOLERANCE = 1e-5  # of an output's range: what a fused form may differ by in float32
PICTURES = 2


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of the log: the fuse error, as a fraction of the range of the output where it is worst, and the shares."""

    error: float
    worst: str
    shares: dict[str, dict[str, float]]  # layer -> branch -> share; the shares of one layer sum to 1


def measure(model: nn.Module, images: torch.Tensor) -> Measurement:
    """The error between `model`, multi-branch and in eval mode, and its fused copy on `images`; and its branches' shares.

    Both run on the CPU: GPUs convolve in TF32 by default, which is a hundred times coarser than what fusing changes.
    Where rounding alone exceeds the tolerance, as in barely trained models, `verify` gives the error in float64.

    Args:
        images: (n, channels, height, width) float32, what the model takes.

    Raises:
        FoldError: a layer cannot be merged, with its path and the reason.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        model = deepcopy(model).cpu()
    with torch.no_grad():
        report = verify(model, fuse(model), [images.cpu()])
    differences = list(report.differences)
    worst = max(differences, key=lambda difference: difference.error)
    return Measurement(float(worst.error), str(worst.name), shares(model))


def shares(model: nn.Module) -> dict[str, dict[str, float]]:
    """Each branch's share of the equivalent kernel, by layer and branch: the norm of its kernel over the sum of the norms.

    0 is a branch that does nothing; in a layer where all are 0 the shares are 0.
    """
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for path, _, parallel in multi_branch(model):
            norms = {name: float(value.weight.double().norm()) for name, value in branch_values(parallel).items()}
            total = sum(norms.values())
            found[path] = {name: norm / total if total else 0.0 for name, norm in norms.items()}
    return found


def not_finite(model: nn.Module) -> list[str]:
    """The names of the weights and buffers of `model` that hold NaN or infinity."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def fixed_images(dataset: Any, count: int = PICTURES) -> torch.Tensor:
    """The first pictures of a validation data set of Ultralytics as a batch, (n, channels, height, width) float32.

    They are read from the data set, as a batch taken from the loader would be missing from the next validation. No random
    number generator moves. Pictures of another shape than the first (rectangular validation) are left out.
    """
    with kept_random_state():
        images = [torch.as_tensor(dataset[i]["img"]) for i in range(min(count, len(dataset)))]
    batch = torch.stack([image for image in images if image.shape == images[0].shape])
    return batch.float() if batch.is_floating_point() else batch.float() / 255


class BranchLog:
    """The file `branches.csv` of one run: a new run starts it, a resumed run continues it."""

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        """Args: `folder` is the run's; without `resume` the files that an earlier run left there are removed."""
        self.csv, self.png = folder / CSV, folder / PNG
        if not resume:
            self.csv.unlink(missing_ok=True)
            self.png.unlink(missing_ok=True)

    def write(self, epoch: int, measured: Measurement) -> None:
        """Put the row of `epoch` (from 1) into the file; rows from `epoch` on are of an attempt that was given up."""
        rows = [row for row in read(self.csv) if int(row["epoch"]) < epoch]
        values = {f"{layer}/{branch}": f"{share:.6g}" for (layer, branch), share in _flat(measured.shares).items()}
        rows.append({"epoch": str(epoch), "fuse_error": f"{measured.error:.6g}", "worst_output": measured.worst, **values})
        columns = list(dict.fromkeys([*FIRST, *(column for row in rows for column in row)]))
        with replacing(self.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def plot(self) -> None:
        """Draw the file as `branches.png`."""
        plot(read(self.csv), self.png)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a `branches.csv`, oldest first; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if (row.get("epoch") or "").isdigit()]


def scalars(measured: Measurement) -> dict[str, float]:
    """The row as TensorBoard names and values, without those that are not finite."""
    values = {f"branches/{layer}/{branch}": share for (layer, branch), share in _flat(measured.shares).items()}
    return {name: value for name, value in {"branches/fuse_error": measured.error, **values}.items() if math.isfinite(value)}


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw rows of a `branches.csv` as the PNG file `path`: error and mean shares by epoch, the last shares by layer."""
    # no pyplot: the caller's backend and figures stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        return
    epochs = [int(row["epoch"]) for row in rows]
    columns = [column for column in rows[-1] if column not in FIRST and rows[-1][column]]
    layers: dict[str, dict[str, str]] = {}
    for column in columns:
        layer, branch = column.rsplit("/", 1)
        layers.setdefault(layer, {})[branch] = column
    kinds = list(dict.fromkeys(column.rsplit("/", 1)[1] for column in columns))
    colors = {kind: f"C{index % 10}" for index, kind in enumerate(kinds)}

    bars = min(max(1.6, 0.24 * len(layers) + 0.9), 40)
    figure = Figure(figsize=(9, 3.4 + bars), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[3.4, bars])
    error_axes, share_axes, layer_axes = (figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1, :]))

    errors = [_number(row["fuse_error"]) for row in rows]
    error_axes.plot(epochs, [error if error > 0 else math.nan for error in errors], ".-", color="black")
    error_axes.axhline(TOLERANCE, color="tab:red", linestyle="--", linewidth=1, label=f"tolerance {TOLERANCE:g}")
    error_axes.set(yscale="log", xlabel="epoch", ylabel="fraction of the output's range", title="multi-branch against fused")
    error_axes.legend(loc="best", fontsize=8)

    for kind in kinds:
        own = [branches[kind] for branches in layers.values() if kind in branches]
        values = np.array([[_number(row.get(column)) for column in own] for row in rows])  # (epochs, layers)
        seen = np.isfinite(values).all(1)
        x, values = np.array(epochs)[seen], values[seen]
        share_axes.plot(x, values.mean(1), ".-", color=colors[kind], label=kind)
        share_axes.fill_between(x, values.min(1), values.max(1), color=colors[kind], alpha=0.15, linewidth=0)
    share_axes.set(xlabel="epoch", ylim=(0, 1), title="share of a branch: mean and range of layers")
    if kinds:
        share_axes.legend(loc="best", fontsize=8)
    for axes in (error_axes, share_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    start = np.zeros(len(layers))
    for kind in kinds:
        widths = np.array([_number(rows[-1].get(branches.get(kind, ""), "0")) for branches in layers.values()])
        widths = np.nan_to_num(widths)
        layer_axes.barh(range(len(layers)), widths, left=start, color=colors[kind], height=0.8)
        start += widths
    layer_axes.set(xlim=(0, 1), xlabel=f"share of the equivalent kernel, epoch {epochs[-1]}")
    layer_axes.set_yticks(range(len(layers)), list(layers), fontsize=7)
    layer_axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top

    with replacing(path) as temporary:
        canvas.print_figure(str(temporary), dpi=110, format="png")


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts the random number generators back, so that a training with the log makes the same weights as one without it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # nothing that is kept from moving draws on a GPU
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _flat(nested: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {(layer, branch): share for layer, branches in nested.items() for branch, share in branches.items()}


def _number(text: str | None) -> float:
    return float(text) if text else math.nan

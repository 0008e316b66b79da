"""The HTML report of a run: pictures of the model's layers and rows, and of what two of its forms find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.export import svg
from rep_backbones.export.html import Row, Sketches, page
from rep_backbones.export.report import Report
from rep_backbones.fuse import fuse
from rep_backbones.rules import branch_names, multi_branch
from rep_backbones.yolo import backends, checkpoint
from rep_backbones.yolo.samples import CONFIDENCE, first, samples

TYPES = 8  # of layers that are drawn


@dataclass(frozen=True)
class Shown:
    """The pictures of a run, as `batch`, `(n, c, h, w)`, what the trained model finds in them, and what is known already of
    the artefacts by format.
    """

    batch: Tensor
    paths: Sequence[Path]
    trained: Callable[[], Tensor]
    predictions: Mapping[str, Tensor]


def report_page(
    report: Report,
    loaded: checkpoint.Checkpoint,
    deployed: nn.Module | None,
    made: dict[str, Path],
    shown: Shown,
) -> str:
    """The HTML of a report.

    A picture that cannot be made is left out and noted in the report: it is no reason to lose what is proved.

    Args:
        loaded: the trained model, multi-branch.
        deployed: the fused one, if it came out.
        made: the files of the run where they are now, by format, in the order in which they were made.
        shown: the pictures in which two forms look for objects: the trained one, and the artefact that was made last.
    """
    sketches = Sketches(confidence=CONFIDENCE)
    with _left_out(report, "the layers"):
        sketches.layers = layers(loaded.model)
    with _left_out(report, "the network's rows"):
        sketches.rows = rows(loaded.model, deployed)
    with _left_out(report, "the detections"):
        found = {"trained": shown.trained()}
        if deployed is not None:
            last = next((name for name in reversed(made) if name != "pt" and backends.can_run(made[name])), "pt")
            if last in shown.predictions:
                found[last] = shown.predictions[last]
            else:
                found[last] = predicted(deployed if last == "pt" else backends.runner(made[last]), shown.batch)
        sketches.samples = samples(
            found,
            shown.paths,
            task=loaded.task,
            names=loaded.names,
            size=shown.batch.shape[2:],
            strides=[int(stride) for stride in loaded.stride],
        )
    return page(report.as_dict(), sketches)


def predicted(run: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
    """What a model or an artefact gives for each picture of `batch`, `(n, c, h, w)`, one by one; float32, on the CPU."""
    with torch.no_grad():
        return torch.cat([first(run(x)).float().cpu() for x in batch.split(1)])


def layers(model: nn.Module) -> list[tuple[str, str]]:
    """One multi-branch layer of each type, that with most branches, as SVG before and after fusing."""
    widest: dict[str, tuple[int, str, nn.Module]] = {}
    for path, layer, part in multi_branch(model):
        kind, count = type(layer).__name__, len(branch_names(part))
        if kind not in widest or count > widest[kind][0]:
            widest[kind] = (count, path, layer)
    found = []
    for kind, (_, path, layer) in list(widest.items())[:TYPES]:
        title = f"{kind} at {path}"
        found.append((title, svg.layers([(title, layer), ("deployed", fuse(layer))], f"{title}, before and after fusing")))
    return found


def rows(model: Any, deployed: Any | None) -> list[Row]:
    """The rows of an Ultralytics model, each with its convolutions before and after."""
    after = [_convs(row) for row in deployed.model] if deployed is not None else [None] * len(model.model)
    return [
        Row(
            place=place,
            name=_name(row),
            branches=max((len(branch_names(part)) for _, _, part in multi_branch(row)), default=0),
            before=_convs(row),
            after=count,
        )
        for place, (row, count) in enumerate(zip(model.model, after, strict=True))
    ]


def _convs(row: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in row.modules())


def _name(row: nn.Module) -> str:
    if type(row) is nn.Sequential and len(row):
        return f"{type(row[0]).__name__} ×\u00a0{len(row)}"
    return type(row).__name__


@contextmanager
def _left_out(report: Report, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of drawing, of the model's own code, or of whatever runtime stands behind the format
        report.notes.append(f"the HTML report lacks {what} ({type(error).__name__}: {error})")

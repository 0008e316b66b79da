"""The HTML report of a run: pictures of the model's layers and rows, and of what two of its forms find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rep_backbones.export import svg
from rep_backbones.export.html import Row, Sketches, page
from rep_backbones.export.report import Report
from rep_backbones.fuse import fuse
from rep_backbones.rules import branch_names, multi_branch
from rep_backbones.yolo import backends, checkpoint
from rep_backbones.yolo.samples import CONFIDENCE, samples

TYPES = 8  # of layers that are drawn


def report_page(
    report: Report,
    loaded: checkpoint.Checkpoint,
    deployed: nn.Module | None,
    made: dict[str, Path],
    size: tuple[int, int],
    pictures: tuple[Path, ...],
) -> str:
    """The HTML of a report.

    A picture that cannot be made is left out and noted in the report: it is no reason to lose what is proved.

    Args:
        loaded: the trained model, multi-branch.
        deployed: the fused one, if it came out.
        made: the files of the run where they are now, by format, in the order in which they were made.
        size: (height, width) of the model's input in pixels.
        pictures: in which both forms look for objects.
    """
    sketches = Sketches(confidence=CONFIDENCE)
    with _left_out(report, "the layers"):
        sketches.layers = layers(loaded.model)
    with _left_out(report, "the network's rows"):
        sketches.rows = rows(loaded.model, deployed)
    with _left_out(report, "the detections"):
        runs: dict[str, Callable[..., Any]] = {"trained": loaded.model}
        if deployed is not None:
            runnable = [name for name, file in made.items() if name != "pt" and backends.can_run(file)]
            for name in runnable[-1:] or ["pt"]:
                runs[name] = deployed if name == "pt" else backends.runner(made[name])
        sketches.samples = samples(
            runs,
            pictures,
            task=loaded.task,
            names=loaded.names,
            size=size,
            strides=[int(stride) for stride in loaded.stride],
            channels=loaded.yaml.get("channels", 3),
            batch=report.settings["batch"],
        )
    return page(report.as_dict(), sketches)


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

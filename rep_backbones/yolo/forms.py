"""The forms of one trained detector side by side: multi-branch, fused and ONNX, evaluated on the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rep_backbones.yolo import checkpoint
from rep_backbones.yolo.backends import model_predictor, predictor
from rep_backbones.yolo.coco_ap import AP, Predict, coco_ap
from rep_backbones.yolo.dataset import DataSet
from rep_backbones.yolo.fuse_export import Outcome


@dataclass(frozen=True)
class Form:
    """One form of a detector, and what was measured of it."""

    name: str
    convs: int
    error: float | None  # against the form it was made from, as a fraction of an output's range
    ap: AP


def evaluated(weights: Path, outcome: Outcome, data: DataSet, size: int, *, progress: bool = True) -> list[Form]:
    """Evaluate the trained checkpoint and what `fuse_export.run` made of it, by pycocotools on square pictures of `size`."""
    trained = checkpoint.load_precise(weights, trust=True)  # our own run wrote it
    report = outcome.report
    artifacts = report.artifacts
    rows: list[tuple[str, int, float | None, Callable[[], Predict]]] = [
        ("multi-branch", report.counts["before"].convs, None, lambda: model_predictor(trained.model)),
        (
            "fused",
            report.counts["after"].convs,
            report.proofs["fuse"]["error"],
            lambda: predictor(outcome.artifacts["pt"], trust=True),
        ),
        (
            "ONNX",
            artifacts["onnx"]["conv_nodes"],
            artifacts["onnx"]["error"],
            lambda: predictor(outcome.artifacts["onnx"]),
        ),
    ]
    return [
        Form(
            name,
            convs,
            error,
            coco_ap(load(), data, names=trained.names, size=size, title=f"evaluating {name}" if progress else ""),
        )
        for name, convs, error, load in rows
    ]


def table(forms: list[Form]) -> str:
    """The forms as a Markdown table."""
    lines = ["| form | convolutions | error | AP50 | AP |", "|---|---|---|---|---|"]
    for form in forms:
        error = "" if form.error is None else f"{form.error:.1e}"
        lines.append(f"| {form.name} | {form.convs} | {error} | {form.ap.ap50:.4f} | {form.ap.ap:.4f} |")
    return "\n".join(lines) + "\n"

"""How long the forms of one detector take, side by side: multi-branch, fused, and each artefact that is run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rep_backbones.export.latency import Latency, measure
from rep_backbones.export.report import Report
from rep_backbones.yolo.artifacts import Job
from rep_backbones.yolo.backends import Runner, model_runner, runner
from rep_backbones.yolo.devices import at_hand, described

TRAINED, FUSED = "multi-branch", "pt"


def add(report: Report, trained: nn.Module, job: Job, files: Mapping[str, Path], tell: Callable[[str], object]) -> None:
    """Measure at batch 1 and at that of the job, and put what was found into the report; a failure becomes a note there.

    Args:
        trained: the multi-branch form.
        job: the deploy model, and the pictures that are taken.
        files: the proved artefacts by format; "pt" stands for the deploy model.
        tell: gets a line of text for each batch.
    """
    try:
        _add(report, trained, job, files, tell)
    except Exception as error:  # out of memory, or of a runtime; what is proved is not lost for it
        report.notes.append(f"the latency is not measured to its end ({type(error).__name__}: {error})")


def _add(report: Report, trained: nn.Module, job: Job, files: Mapping[str, Path], tell: Callable[[str], object]) -> None:
    device = at_hand(job.settings.device)
    runners = {TRAINED: model_runner(trained, device)}
    for name, file in files.items():
        runners[name] = model_runner(job.model, device) if name == FUSED else runner(file, device=device)
    places: dict[str, dict[str, Any]] = {TRAINED: report.trained, **report.artifacts}
    for name, run in runners.items():
        places[name]["latency"] = {"device": described(run.device), "batches": {}}
    for batch in sorted({1, job.settings.batch}):
        pictures = job.batch.repeat(-(-batch // len(job.batch)), 1, 1, 1)[:batch]
        found = measure({name: partial(run, pictures) for name, run in runners.items() if _takes(run, pictures)})
        for name, latency in found.items():
            places[name]["latency"]["batches"][str(batch)] = asdict(latency)
        tell(f"latency at batch {batch}: " + _line(found))


def _takes(run: Runner, pictures: Tensor) -> bool:
    """Whether so many pictures are what the artefact is made for; a static one is timed at its own batch only."""
    return run.batch in (None, len(pictures))


def _line(found: Mapping[str, Latency]) -> str:
    return ", ".join(f"{'fused' if name == FUSED else name} {taken.median_ms:.1f} ms" for name, taken in found.items())

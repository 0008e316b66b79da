"""From a trained checkpoint to proved artefacts: fuse, prove, export, prove again, and report.

    outcome = run("best.pt", formats=["onnx"])

Each step is proved before the next one builds on it. Files are made in a folder of their own beside the target and get
their good names only once they are proved.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import get_flops

from rep_backbones.export.files import replacing, writable_folder
from rep_backbones.export.report import Counts, Report, proof, sha256
from rep_backbones.rules import FoldError, multi_branch
from rep_backbones.verify import verify
from rep_backbones.yolo import artifacts, checkpoint
from rep_backbones.yolo.deploy import save_deploy
from rep_backbones.yolo.pictures import SHIPPED, pictures
from rep_backbones.yolo.plain_data import Refused
from rep_backbones.yolo.proof import Outputs, layer_proofs
from rep_backbones.yolo.switches import no_installs, quiet

PROVED, BAD_INPUT, UNPROVED, MISSING = 0, 2, 3, 4
# Largest side, in pixels, of the pictures on which the fused model is compared: whether two kernels are equal does not
# depend on it. The artefact is compared at its own size.
FUSE_SIDE = 320


@dataclass(frozen=True)
class Settings:
    """What to export; the names are those of `yolo export`."""

    formats: tuple[str, ...] = ()  # empty: ONNX, and an engine where CUDA and TensorRT are
    imgsz: int | tuple[int, ...] | None = None  # pixels, or (height, width); None: what was trained with
    batch: int = 1
    dynamic: bool = False
    half: bool = False
    nms: bool = False
    device: str | None = None
    pictures: tuple[Path, ...] = SHIPPED


@dataclass
class Outcome:
    """What a run came to: its exit status, its report, and the files that it left, by format ("pt", "onnx", ...)."""

    status: int
    report: Report
    artifacts: dict[str, Path] = field(default_factory=dict)


class Unproved(Exception):
    """A proof failed: what was compared, and how far it is off."""


def run(
    weights: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    trust: bool = False,
    verbose: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    **changes: Any,
) -> Outcome:
    """Fuse the checkpoint `weights`, export it and prove every step.

    Args:
        weights: a checkpoint that Ultralytics saved; FP32 weights beside it (`best_fp32.pt`) are used if they belong to it.
        settings: what to export; or give its fields as keywords, such as `formats=("onnx",)`.
        out: the folder to write to, made if missing; by default that of `weights`.
        trust: unpickle the file with all code that it holds, where it is refused otherwise.
        verbose: let Ultralytics speak while it exports.
        tell: gets a line of text at each step.

    Returns:
        The outcome, whose status is 0 (all proved), 3 (a proof failed, or branches are left) or 4 (a backend is missing).

    Raises:
        Refused: the checkpoint is damaged, of another kind, would run code, or cannot be fused.
        TargetError: the target cannot be written.
        ValueError: a setting that is not accepted.
    """
    settings = settings or Settings(**changes)
    formats = artifacts.chosen(settings.formats)
    if settings.batch < 1:
        raise ValueError(f"batch={settings.batch} is not accepted; give a whole number from 1")
    file = checkpoint.existing(weights)
    target = writable_folder(out or file.parent)
    loaded = checkpoint.load_precise(file, trust=trust)
    size = image_size(settings.imgsz, loaded)
    batch = pictures(size, loaded.yaml.get("channels", 3), settings.pictures)
    report = Report(source=_source(loaded, trust), settings=_plain(settings, size, formats))
    outcome = Outcome(PROVED, report)
    if loaded.note:
        report.notes.append(loaded.note)
    stem = f"{file.stem}_deploy"
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".fuse_export-", dir=target)))
        stack.enter_context(no_installs())
        stack.enter_context(quiet(not verbose))
        try:
            deployed = _fused(loaded, work / f"{stem}.pt", batch, settings.pictures, report, tell)
            outcome.artifacts["pt"] = _keep(work / f"{stem}.pt", target, report, "pt", tell)
            job = artifacts.Job(outcome.artifacts["pt"], work / f"{stem}.pt", deployed, batch, settings, size)
            for name in formats:
                tell(f"exporting to {name}")
                made = artifacts.FORMATS[name](job)
                report.notes += made.notes
                report.artifacts[name] = made.about
                if made.missing:
                    report.failures.append(made.missing)
                    outcome.status = outcome.status or MISSING
                    tell(made.missing)
                    continue
                if made.failures:
                    report.failures += made.failures
                    outcome.status = UNPROVED
                outcome.artifacts[name] = _keep(made.path, target, report, name, tell, proved=not made.failures)
        except (Unproved, artifacts.ExportFailed) as error:
            report.failures.append(str(error))
            outcome.status = UNPROVED
            if (work / f"{stem}.pt").exists() and "pt" not in outcome.artifacts:
                outcome.artifacts["pt"] = _keep(work / f"{stem}.pt", target, report, "pt", tell, proved=False)
        report.status = outcome.status
        report.write(target / f"{stem}_report.json")
    return outcome


def image_size(given: int | Sequence[int] | None, loaded: checkpoint.Checkpoint) -> tuple[int, int]:
    """(height, width) in pixels, rounded up to the stride as Ultralytics does."""
    wanted: Any = loaded.args.get("imgsz", 640) if given is None else given
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else wanted
    sides = wanted if isinstance(wanted, list) else [wanted]
    if len(sides) not in (1, 2) or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"imgsz={given!r} is not accepted; give pixels, such as 640, or height and width, such as 480 640")
    height, width = check_imgsz(sides, stride=int(loaded.stride.max()), min_dim=2)
    return height, width


def _fused(
    loaded: checkpoint.Checkpoint,
    target: Path,
    batch: Tensor,
    paths: Sequence[Path],
    report: Report,
    tell: Callable[[str], object],
) -> nn.Module:
    """The deploy model as written to `target` and read back, proved against the trained one."""
    model = loaded.model
    layers = multi_branch(model)
    if not layers:
        report.notes.append(f"{loaded.path.name} has no multi-branch layers: it is exported as it is")
    report.counts["before"] = counts(model, batch)
    stride = int(loaded.stride.max())
    small = max(FUSE_SIDE // stride, 1) * stride
    side = (min(batch.shape[2], small), min(batch.shape[3], small))
    shown = pictures(side, batch.shape[1], paths)
    try:
        report.layers = layer_proofs(model, shown[:1])
        about = {"date": loaded.date, "version": loaded.version, "train_args": loaded.args}
        save_deploy(model, target, checkpoint={key: value for key, value in about.items() if value is not None})
    except FoldError as error:
        raise Refused(f"{loaded.path} cannot be fused: {error}", "nothing was written") from error
    deployed = checkpoint.load(target, trust=True).model  # this very run wrote it
    report.counts["after"] = after = counts(deployed, batch)
    compared = verify(Outputs(model), Outputs(deployed), shown.split(1))
    report.proofs["fuse"] = proof(compared)
    bad = [layer for layer in report.layers if not layer.ok]
    worst = max((layer.error for layer in report.layers), default=0.0)
    tell(
        f"fused {len(layers)} multi-branch layers: {report.counts['before'].convs} -> {after.convs} convolutions, "
        f"largest error {compared.error:.1e} of an output's range, {worst:.1e} of a layer's"
    )
    if after.multi_branch_layers:
        raise Unproved(f"{after.multi_branch_layers} multi-branch layers are left after fusing")
    if bad:
        raise Unproved(f"layer {bad[0].path} ({bad[0].type}) is off by {bad[0].error:.1e} of its range after fusing")
    if not compared.ok:
        raise Unproved(f"the fused model computes something else:\n{compared}")
    return deployed


def counts(model: nn.Module, batch: Tensor) -> Counts:
    """Of an Ultralytics model, for pictures of the size of `batch`, `(n, c, h, w)`."""
    return Counts(
        multi_branch_layers=len(multi_branch(model)),
        convs=sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gflops=round(float(get_flops(model, list(batch.shape[2:]))), 3),
    )


def _keep(
    made: Path, target: Path, report: Report, name: str, tell: Callable[[str], object], *, proved: bool = True
) -> Path:
    """Give a file its place, under its good name only if it is proved."""
    path = target / (made.name if proved else f"{made.stem}.unproved{made.suffix}")
    digest = sha256(made)
    with replacing(path) as temporary:
        if name == "pt":  # the exporter reads it again
            temporary.write_bytes(made.read_bytes())
        else:
            os.replace(made, temporary)
    about = report.artifacts.setdefault(name, {})
    about.update(path=path.name, sha256=digest, bytes=path.stat().st_size, proved=proved)
    tell(f"{'wrote' if proved else 'NOT PROVED, kept as'} {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def _source(loaded: checkpoint.Checkpoint, trust: bool) -> dict[str, Any]:
    return {
        "path": loaded.path.name,
        "sha256": loaded.digest,
        "task": loaded.task,
        "stored_as": str(loaded.dtype).removeprefix("torch."),
        "fp32_weights_used": loaded.precise,
        "epoch": loaded.epoch,
        "date": loaded.date,
        "ultralytics": loaded.version,
        "trusted": trust,
    }


def _plain(settings: Settings, size: tuple[int, int], formats: Sequence[str]) -> dict[str, Any]:
    return {
        "formats": list(formats),
        "imgsz": list(size),
        "batch": settings.batch,
        "dynamic": settings.dynamic,
        "half": settings.half,
        "nms": settings.nms,
        "device": settings.device,
        "pictures": [path.name for path in settings.pictures],
    }

"""From a trained checkpoint to proved artefacts: fuse, prove, export, prove again, and report.

    outcome = run("best.pt", formats=["onnx"])

Each step is proved before the next one builds on it. Files are made in a folder of their own beside the target and get
their good names only once they are proved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import get_flops

from rep_backbones.export.files import TargetError, disk_is_full, place, replacing, workplace, writable_folder
from rep_backbones.export.report import Counts, Report, bytes_of, proof, sha256
from rep_backbones.foreign.fusing import fuse_measured
from rep_backbones.fuse import report as fuse_report
from rep_backbones.rules import FoldError, check_numbers, multi_branch
from rep_backbones.verify import Mismatch, verify
from rep_backbones.yolo import artifacts, checkpoint, devices, timing, with_data
from rep_backbones.yolo import formats as known
from rep_backbones.yolo.deploy import save_deploy, what_it_needs
from rep_backbones.yolo.pictures import SHIPPED, pictures
from rep_backbones.yolo.plain_data import Refused
from rep_backbones.yolo.proof import Outputs, layer_proofs
from rep_backbones.yolo.report_page import Shown, predicted, report_page
from rep_backbones.yolo.switches import no_downloads, no_installs, quiet

PROVED, BAD_INPUT, UNPROVED, MISSING = 0, 2, 3, 4
# Side, in pixels, of the picture on which layers without a rule are measured: what they see there is one of their proofs.
FOREIGN_SIDE = 128
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
    int8: bool = False
    int8_max_drop: float = 1.0  # AP that INT8 may lose, in points of 100
    data: Path | None = None  # a YOLO data YAML or a folder in COCO's layout
    device: str | None = None
    pictures: tuple[Path, ...] = ()  # to prove on; empty: two of `data`, or else those that Ultralytics ships
    foreign: str = "measure"  # what to do with layers without a rule: "measure", "keep" or "refuse"
    latency: bool = True  # measure how long each form takes, in a few seconds
    imports: tuple[str, ...] = ()  # the user's own code that was imported, for the report


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
    formats = artifacts.chosen((*settings.formats, "onnx") if settings.int8 and settings.formats else settings.formats)
    known.check(formats, settings)
    if settings.batch < 1:
        raise ValueError(f"batch={settings.batch} is not accepted; give a whole number from 1")
    settings, lacking = devices.here(settings)
    file = checkpoint.existing(weights)
    target = writable_folder(out or file.parent)
    loaded = checkpoint.load_precise(file, trust=trust)
    _check_numbers(loaded)
    if settings.nms and loaded.task == "classify":
        raise ValueError("--nms suppresses boxes, and a classifier gives none; leave it out")
    data = with_data.opened(settings, loaded)
    if not settings.pictures:
        settings = replace(
            settings, pictures=SHIPPED if data is None else tuple(each.path for each in data.some(2).pictures)
        )
    size = image_size(settings.imgsz, loaded)
    batch = pictures(size, loaded.yaml.get("channels", 3), settings.pictures)
    report = Report(source=_source(loaded, trust), settings=_plain(settings, size, formats))
    report.notes += [note for note in (loaded.note, lacking) if note]
    stem = f"{file.stem}_deploy"
    with ExitStack() as stack:
        work = stack.enter_context(workplace(target))
        stack.enter_context(no_installs())
        stack.enter_context(no_downloads())
        stack.enter_context(quiet(not verbose))
        making = Making(report, target, work / stem, tell, status=MISSING if lacking else PROVED)
        beside = ThreadPoolExecutor(1)
        stack.callback(beside.shutdown, cancel_futures=True)
        deployed = None
        trained: Callable[[], Tensor] = partial(predicted, loaded.model, batch)
        try:
            deployed = _fused(loaded, making, batch, settings)
            job = artifacts.Job(target / f"{stem}.pt", making.path(".pt"), deployed, batch, settings, size, verbose)
            beside.submit(artifacts.answers, job)  # meanwhile: an export traces on one core
            trained = beside.submit(trained).result
            making.keep("pt", making.path(".pt"))
            for name in formats:
                making.add(name, job)
            beside.shutdown()  # what is measured next has the machine for itself
            if data is not None and settings.int8:
                with_data.add_int8(making, job, data, loaded)
            if data is not None:
                with_data.add_ap(making, loaded.model, deployed, data, job, loaded.names)
            if settings.latency:
                timing.add(report, loaded.model, job, making.proved(), tell)
        except Unproved as error:
            making.fail(str(error))
            if making.path(".pt").exists():
                making.keep("pt", making.path(".pt"), proved=False)
                deployed = checkpoint.load(making.path(".pt"), trust=True).model  # for the pictures of what is wrong
        report.status = making.status
        shown = Shown(batch, settings.pictures, trained, making.predictions)
        making.write_page(report_page(report, loaded, deployed, making.made, shown))
        report.write(making.path("_report.json"))
        making.place()
    return Outcome(making.status, report, making.places)


@dataclass
class Making:
    """The files of a run: made in a folder of their own, and given their places together, when all is done."""

    report: Report
    target: Path
    stem: Path  # in the work folder, without ending
    tell: Callable[[str], object]
    status: int = PROVED
    places: dict[str, Path] = field(default_factory=dict)  # where each will be
    moves: list[tuple[Path, Path]] = field(default_factory=list)
    predictions: dict[str, Tensor] = field(default_factory=dict)  # what the artefacts gave for the pictures

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    @property
    def made(self) -> dict[str, Path]:
        """The finished files where they are now, by format."""
        return {name: made for name, (made, _) in zip(self.places, self.moves)}

    def fail(self, what: str, status: int = UNPROVED) -> None:
        """Note a failure; the gravest status stays."""
        self.report.failures.append(what)
        self.status = status if self.status != UNPROVED else UNPROVED

    def add(self, name: str, job: artifacts.Job) -> None:
        """Make the artefact of one format, and keep it under a name that says whether it is proved."""
        self.tell(f"exporting to {name}")
        try:
            made = artifacts.make(name, job)
        except artifacts.ExportFailed as error:
            if disk_is_full(error):
                raise TargetError(f"cannot write to {self.target}: No space left on device. Free the space on it") from error
            self.fail(str(error))
            self.tell(str(error))
            return
        self.report.notes += made.notes
        self.report.artifacts[name] = made.about
        if made.predictions is not None:
            self.predictions[name] = made.predictions
        if made.missing:
            self.fail(made.missing, MISSING)
            self.tell(made.missing)
            return
        for failure in made.failures:
            self.fail(failure)
        self.keep(name, made.path, proved=not made.failures if made.run else None)

    def keep(self, name: str, made: Path, *, proved: bool | None = True) -> None:
        """A finished file or folder, and where it will be: not under its good name if its proof failed.

        Args:
            proved: None if it was not run.
        """
        ending = made.name.removeprefix(self.stem.name)
        path = self.target / (f"{self.stem.name}.unproved{ending}" if proved is False else made.name)
        self.places[name] = path
        self.moves.append((made, path))
        about = self.report.artifacts.setdefault(name, {})
        about.update(path=path.name, sha256=sha256(made), bytes=bytes_of(made), proved=proved)

    def proved(self) -> dict[str, Path]:
        """What is proved, by format, where it is now."""
        made = {path: file for file, path in self.moves}
        return {name: made[path] for name, path in self.places.items() if self.report.artifacts[name]["proved"]}

    def write_page(self, html: str) -> None:
        with replacing(self.path("_report.html")) as temporary:
            temporary.write_text(html, encoding="utf-8")

    def place(self) -> None:
        """Give everything its place, the report last: its hashes tell whether all others are of the same run."""
        reports = [self.path("_report.html"), self.path("_report.json")]
        place([*self.moves, *((report, self.target / report.name) for report in reports)])
        said = {True: "wrote", False: "NOT PROVED, kept as", None: "wrote, NOT RUN,"}
        for name, path in self.places.items():
            about = self.report.artifacts[name]
            self.tell(f"{said[about['proved']]} {path} ({about['bytes'] / 1e6:.1f} MB)")
        self.tell(f"wrote {self.target / reports[0].name}, to be opened in a browser")


def _check_numbers(loaded: checkpoint.Checkpoint) -> None:
    try:
        check_numbers(loaded.model)
    except FoldError as error:
        raise Refused(f"{loaded.path} cannot be fused: {error}", "nothing was written") from error


def image_size(given: int | Sequence[int] | None, loaded: checkpoint.Checkpoint) -> tuple[int, int]:
    """(height, width) in pixels, rounded up to the stride as Ultralytics does."""
    wanted: Any = loaded.args.get("imgsz", 640) if given is None else given
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else wanted
    sides = wanted if isinstance(wanted, list) else [wanted]
    if len(sides) not in (1, 2) or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"imgsz={given!r} is not accepted; give pixels, such as 640, or height and width, such as 480 640")
    height, width = check_imgsz(sides, stride=int(loaded.stride.max()), min_dim=2)
    return height, width


def _fused(loaded: checkpoint.Checkpoint, making: Making, batch: Tensor, settings: Settings) -> nn.Module:
    """The deploy model as written and read back, proved against the trained one."""
    paths = settings.pictures
    model, report, target = loaded.model, making.report, making.path(".pt")
    layers = multi_branch(model)
    if not layers:
        report.notes.append(f"{loaded.path.name} has no multi-branch layers: it is exported as it is")
    report.counts["before"] = counts(model, batch)
    stride = int(loaded.stride.max())
    small = _sides(FUSE_SIDE, stride)
    side = (min(batch.shape[2], small[0]), min(batch.shape[3], small[1]))
    shown = pictures(side, batch.shape[1], paths)
    try:
        fused, places, _ = fuse_report(model, foreign="refuse" if settings.foreign == "refuse" else "keep")
        report.layers = layer_proofs(model, fused, places, shown[:1])
        if settings.foreign == "measure":
            fused = _measured(fused, making, pictures(_sides(FOREIGN_SIDE, stride), batch.shape[1], paths)[:1])
        about = {"date": loaded.date, "version": loaded.version, "train_args": loaded.args}
        known_about = {key: value for key, value in about.items() if value is not None}
        save_deploy(model, target, checkpoint=known_about, fused=fused)
    except FoldError as error:
        raise Refused(f"{loaded.path} cannot be fused: {error}", "nothing was written") from error
    deployed = checkpoint.load(target, trust=True).model  # this very run wrote it
    report.counts["after"] = after = counts(deployed, batch)
    bad = [layer for layer in report.layers if not layer.ok]
    try:
        compared = verify(Outputs(model), Outputs(deployed), shown.split(1))
    except (Mismatch, RuntimeError) as error:  # another shape, at the end or on the way there
        first = f"layer {bad[0].path} ({bad[0].type}) gives another shape" if bad else "it gives another shape"
        raise Unproved(f"the fused model computes something else: {first} ({error})") from error
    report.proofs["fuse"] = proof(compared)
    worst = max((layer.error for layer in report.layers), default=0.0)
    making.tell(
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


def _sides(pixels: int, stride: int) -> tuple[int, int]:
    return (max(pixels // stride, 1) * stride,) * 2


def _measured(fused: nn.Module, making: Making, example: Tensor) -> nn.Module:
    """The model with its layers that have no rule merged where they were proved; the report tells of each."""
    measured, making.report.foreign = fuse_measured(fused, example)
    merged = [found for found in making.report.foreign if found.outcome == "merged"]
    if making.report.foreign:
        before, after = sum(f.convs_before for f in merged), sum(f.convs_after for f in merged)
        making.tell(
            f"measured {len(making.report.foreign)} layers without a rule: {len(merged)} merged, {before} -> {after} "
            f"convolutions; {len(making.report.foreign) - len(merged)} left, for reasons that the report gives"
        )
    making.report.notes += what_it_needs(measured)
    return measured


def counts(model: nn.Module, batch: Tensor) -> Counts:
    """Of an Ultralytics model, for pictures of the size of `batch`, `(n, c, h, w)`."""
    return Counts(
        multi_branch_layers=len(multi_branch(model)),
        convs=sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gflops=round(float(get_flops(model, list(batch.shape[2:]))), 3),
    )


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
        "int8": settings.int8,
        "int8_max_drop": settings.int8_max_drop,
        "data": settings.data and Path(settings.data).name,
        "device": settings.device,
        "pictures": [path.name for path in settings.pictures],
        "foreign": settings.foreign,
        "latency": settings.latency,
        "imports": [Path(name).name for name in settings.imports],
    }

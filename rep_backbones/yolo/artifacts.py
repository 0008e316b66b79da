"""What can be made of a deploy model: one function for each format, that exports it and proves the file by running it.

Ultralytics' exporter does the work, so that the files carry the metadata that `yolo predict model=best_deploy.onnx` needs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.exporter import NMSModel
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT

from rep_backbones.export import tensorrt
from rep_backbones.export.detections import compare_rows
from rep_backbones.export.onnx_model import RESOLUTION, OnnxModel
from rep_backbones.export.report import proof
from rep_backbones.verify import Report, verify
from rep_backbones.yolo import formats as known
from rep_backbones.yolo.backends import runner
from rep_backbones.yolo.proof import conv_calls, exported_form, split
from rep_backbones.yolo.switches import jit_unwarned, muted, threads_kept, untold

if TYPE_CHECKING:
    from rep_backbones.yolo.fuse_export import Settings

FP32, FP16, ENGINE = 1e-5, 2e-2, 1e-2  # of an output's range; an engine computes in TF32 unless it is told not to

# of an output's range, all computing in float32; measured on EfficientRep-n and its QARepVGG form, trained, at 320 px:
# TorchScript 0, OpenVINO 8e-7, NCNN 2.1e-6, and 4e-7 without its Winograd convolutions, which round more
TOLERANCES = {"torchscript": 1e-6, "openvino": FP32, "ncnn": 2e-5}

LOUD = {"ncnn"}  # whose converter is a program that prints what it does
GPU_HALF = {"torchscript"}  # which Ultralytics writes in FP16 on a GPU only
ONE_BY_ONE = {"ncnn"}  # whose runtime takes one picture at a time; a file for more computes something else

NMS = {"conf": 0.25, "iou": 0.7, "max_det": 300, "agnostic_nms": False}  # Ultralytics' defaults, in the graph with --nms

OPSET = 18  # what Ultralytics 8.4 chooses; 8.3 chooses one that today's exporter of PyTorch has not


@dataclass(frozen=True)
class Job:
    """A deploy model that is to be exported."""

    kept: Path  # where the user finds its checkpoint
    checkpoint: Path  # the copy that is exported from; artefacts appear beside it
    model: Any  # an Ultralytics model, float32, on the CPU
    batch: Tensor  # (n, c, h, w), pictures
    settings: Settings
    size: tuple[int, int]  # (height, width) in pixels
    verbose: bool = False  # let the programs that convert speak
    answered: dict[bool, list[list[Tensor]]] = field(default_factory=dict)  # of `answers`
    lock: Any = field(default_factory=Lock)


@dataclass
class Made:
    """A file and what was found out about it."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)  # goes into the report
    failures: list[str] = field(default_factory=list)  # why it is not proved
    missing: str = ""  # why there is no file, and what to do
    notes: list[str] = field(default_factory=list)
    run: bool = True  # whether the file was run and compared
    predictions: Tensor | None = None  # (n, ...), its first output for the pictures of the job


def chosen(formats: Sequence[str]) -> list[str]:
    """The formats to make, those of FORMATS first; an engine is made from ONNX, which is then made too.

    Raises:
        ValueError: a format that is not known, with those that are.
    """
    wanted = list(formats) or ["onnx", *([] if tensorrt.missing() else ["engine"])]
    accepted = list(dict.fromkeys([*FORMATS, *known.names()]))
    for name in wanted:
        if name not in accepted:
            raise ValueError(f"--format {name} is not known; accepted are {', '.join(accepted)}")
    return [name for name in accepted if name in wanted or (name == "onnx" and "engine" in wanted)]


def make(name: str, job: Job) -> Made:
    """The artefact of one format.

    Raises:
        ExportFailed: Ultralytics' exporter or what stands behind it failed.
    """
    return FORMATS.get(name, partial(make_unproved, name))(job)


def make_onnx(job: Job) -> Made:
    """Export to ONNX and prove the file with ONNX Runtime."""
    path = _exported(job, "onnx")
    made = Made(path)
    try:
        graph = OnnxModel(path)
    except ValueError as error:
        made.failures.append(str(error))
        return made
    tolerance = FP16 if graph.half else FP32
    try:
        compared = _compare(job, graph, end2end=_flag(graph.metadata, "end2end"), tolerance=tolerance, made=made)
    except ValueError as error:
        made.failures.append(f"{path.name} computes something else than the fused model: {error}")
        return made
    stride = 2 * int(torch.as_tensor(job.model.stride).max())
    expected = conv_calls(job.model, job.batch[:1, :, :stride, :stride])
    unknown = tensorrt.unsupported(graph.operators)
    made.about = {
        **proof(compared),
        "conv_nodes": graph.conv_nodes,
        "conv_modules": expected,
        "opset": graph.opset,
        "precision": "fp16" if graph.half else "fp32",
        "input": graph.input_shape,
        "unknown_to_tensorrt": unknown,
    }
    _judge(made, compared)
    if graph.leftover_branches:
        made.failures.append(f"{path.name} still sums parallel branches at {', '.join(graph.leftover_branches[:5])}")
    if graph.conv_nodes > expected:
        made.failures.append(f"{path.name} has {graph.conv_nodes} convolutions where the fused model runs {expected}")
    if job.settings.half and not graph.half:
        made.notes.append(f"{path.name} is FP32: this Ultralytics writes FP16 on a GPU only; give --device 0")
    if unknown:
        made.notes.append(f"{path.name} uses operators that TensorRT may not know: {', '.join(unknown)}")
    return made


def make_engine(job: Job) -> Made:
    """Build a TensorRT engine and prove it; where it cannot be built, say how to."""
    onnx = job.kept.with_suffix(".onnx")
    path = job.checkpoint.with_suffix(".engine")
    shape = (job.settings.batch, job.batch.shape[1], *job.size)
    stride = int(torch.as_tensor(job.model.stride).max())
    line = tensorrt.trtexec_line(
        str(onnx),
        str(onnx.with_suffix(".engine")),
        shape,
        dynamic=job.settings.dynamic,
        half=job.settings.half,
        minimum=stride,
    )
    if reason := tensorrt.missing():
        where = f"--format engine: {reason}. The ONNX file is kept; on a machine with TensorRT run\n    {line}"
        return Made(path, {"missing": reason, "trtexec": line}, missing=where)
    try:
        _exported(job, "engine")
    except ExportFailed as error:
        where = f"--format engine: {error}. The ONNX file is kept; build the engine with\n    {line}"
        return Made(path, {"missing": str(error), "trtexec": line}, missing=where)
    made = Made(path)
    compared = _compare(
        job, runner(path, device=f"cuda:{job.settings.device or 0}"), end2end=None, tolerance=ENGINE, made=made
    )
    made.about = {**proof(compared), "precision": "fp16" if job.settings.half else "fp32", "trtexec": line}
    _judge(made, compared)
    return made


def make_and_run(name: str, job: Job) -> Made:
    """Export to a format of `backends.OPENERS` and prove the file with its own runtime on the CPU."""
    if reason := known.missing(name):
        return _missing(name, reason)
    path = _exported(job, name)
    made = Made(path)
    try:
        run = runner(path)
        halved = run.precision == "fp16" if name in GPU_HALF else job.settings.half
        compared = _compare(
            job,
            run,
            end2end=run.about.get("end2end"),
            tolerance=FP16 if halved else TOLERANCES[name],
            made=made,
        )
    except Exception as error:  # each runtime has exceptions of its own
        made.failures.append(f"{path.name} cannot be run: {error}")
        return made
    made.about = {**proof(compared), "precision": "fp16" if halved else "fp32"}
    _judge(made, compared)
    if job.settings.half and not halved:
        made.notes.append(f"{path.name} is FP32: Ultralytics writes FP16 on a GPU only; give --device 0")
    return made


def _judge(made: Made, compared: Report) -> None:
    if not compared.ok:
        made.failures.append(f"{made.path.name} computes something else than the fused model:\n{compared}")


def make_unproved(name: str, job: Job) -> Made:
    """Export to a format that is not run here: the file is Ultralytics' word."""
    if reason := known.missing(name):
        return _missing(name, reason)
    path = _exported(job, name)
    note = f"not run: {path.name} is as Ultralytics made it, and nothing here runs it; prove it where it is deployed"
    return Made(path, {"note": note}, notes=[note], run=False)


def _missing(name: str, reason: str) -> Made:
    return Made(Path(), {"missing": reason}, missing=f"--format {name}: {reason}")


# the visible table of what `--format` takes and proves, in the order in which it is made
FORMATS: dict[str, Callable[[Job], Made]] = {
    "onnx": make_onnx,
    "engine": make_engine,
    **{name: partial(make_and_run, name) for name in TOLERANCES},
}


class ExportFailed(Exception):
    """Ultralytics' exporter failed, with its reason."""


def _exported(job: Job, name: str) -> Path:
    wanted = job.settings
    options: dict[str, Any] = {"format": name, "imgsz": list(job.size), "dynamic": wanted.dynamic}
    options["batch"] = 1 if name in ONE_BY_ONE else wanted.batch
    if name in ("onnx", "engine") or "opset" in known.arguments(name):
        options["opset"] = OPSET
    if wanted.half and not (name in GPU_HALF and wanted.device in (None, "cpu")):
        options |= {"quantize": 16} if "quantize" in DEFAULT_CFG_DICT else {"half": True}
    if wanted.nms:
        options |= {"nms": True, **NMS}
    options["device"] = wanted.device if wanted.device is not None else ("0" if name == "engine" else "cpu")
    try:
        with (
            untold(),
            threads_kept(),
            jit_unwarned(),
            muted(name in LOUD and not job.verbose),
            tempfile.TemporaryDirectory() as folder,
        ):
            return _at_home(job, Path(folder), options)
    except Exception as error:  # of whatever library stands behind the format
        raise ExportFailed(
            f"exporting to {name} failed ({type(error).__name__}: {error}); --verbose shows what the exporter said"
        ) from error


def _at_home(job: Job, spare: Path, options: dict[str, Any]) -> Path:
    """Export beside the checkpoint; by way of a copy in `spare` where ".pt" stands elsewhere in its path too.

    For a folder, Ultralytics replaces that by its ending all over the path.
    """
    file = job.checkpoint
    if str(file).count(".pt") > 1:
        file = Path(shutil.copyfile(file, spare / "model.pt"))
    made = Path(YOLO(str(file)).export(**options, verbose=False))
    if file == job.checkpoint:
        return made
    home = job.checkpoint.with_name(job.checkpoint.name.removesuffix(".pt") + made.name.removeprefix("model"))
    return Path(shutil.move(made, home))


def _compare(
    job: Job, artifact: Callable[[Tensor], list[Tensor]], *, end2end: bool | None, tolerance: float, made: Made
) -> Report:
    """The artefact against the deploy model in FP32, on pictures in each shape that it was made for."""
    batches = list(_batches(job))
    first: list[Tensor] = []

    def run(x: Tensor) -> list[Tensor]:
        outputs = artifact(x)
        first.append(outputs[0])
        return outputs

    compared = _compared(job, run, batches, end2end=end2end, tolerance=tolerance, made=made)
    own = [found for x, found in zip(batches, first, strict=True) if x.shape[2:] == job.batch.shape[2:]]
    made.predictions = torch.cat(own)[: len(job.batch)]
    return compared


def _compared(
    job: Job,
    artifact: Callable[[Tensor], list[Tensor]],
    batches: list[Tensor],
    *,
    end2end: bool | None,
    tolerance: float,
    made: Made,
) -> Report:
    expected = answers(job, end2end)
    if not _rows(job, end2end):
        nc = 0 if job.model.task == "classify" else job.model.model[-1].nc
        each = iter(expected)
        return verify(
            lambda x: _parts(next(each), nc),
            lambda x: _parts(artifact(x), nc),
            batches,
            tolerance=tolerance,
            resolution=RESOLUTION,
        )
    with torch.no_grad():
        pairs = [(outputs[0], artifact(x)[0]) for outputs, x in zip(expected, batches, strict=True)]
    compared, found = compare_rows(pairs, size=max(job.size), tolerance=max(tolerance, 1e-4))
    if not found:
        made.notes.append(f"{made.path.name}: the pictures show nothing that is detected, so its final rows prove little")
    return compared


def answers(job: Job, end2end: bool | None = None) -> list[list[Tensor]]:
    """What the deploy model answers, in the form that is exported, to each batch that an artefact is compared on.

    Computed once for all formats, and while the first one is exported if a thread beside it asks first.
    """
    form = bool(getattr(job.model, "end2end", False)) if end2end is None else end2end
    with job.lock:
        if form not in job.answered:
            reference = exported_form(job.model, form, corners=job.settings.nms)
            if job.settings.nms:
                arguments = {"format": "onnx", "batch": job.settings.batch, **NMS}
                reference = NMSModel(reference, get_cfg(DEFAULT_CFG, arguments)).eval()
            with torch.no_grad():
                job.answered[form] = [_listed(reference(x)) for x in _batches(job)]
        return job.answered[form]


def gives_rows(job: Job, graph: OnnxModel) -> bool:
    """Whether an ONNX file gives final detections, by NMS in the graph or an end-to-end head."""
    return _rows(job, _flag(graph.metadata, "end2end"))


def _rows(job: Job, end2end: bool | None) -> bool:
    return job.settings.nms or bool(getattr(job.model, "end2end", False) and end2end is not False)


def _batches(job: Job) -> Iterator[Tensor]:
    n, pictures = job.settings.batch, len(job.batch)
    filled = -(-pictures // n) * n  # the last batch is filled up with pictures that were there before
    repeated = job.batch.repeat(-(-filled // pictures), 1, 1, 1)[:filled]
    yield from repeated.split(n)
    if job.settings.dynamic:  # other sizes too: a batch of two lower pictures
        stride = int(torch.as_tensor(job.model.stride).max())
        height = max(job.size[0] - stride, stride)
        yield repeated[: min(n, 2), :, :height]


def _parts(outputs: list[Tensor], nc: int) -> dict[str, Tensor]:
    if not nc:
        return {str(index): value for index, value in enumerate(outputs)}
    return {**split(outputs[0], nc), **{str(index): value for index, value in enumerate(outputs[1:], 1)}}


def _listed(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (list, tuple)) else [output]


def _flag(metadata: dict[str, str], key: str) -> bool | None:
    return None if key not in metadata else metadata[key] == "True"

"""Artefacts that can be run here, whatever stands behind them: pictures in, predictions out.

    run = runner("best_deploy_openvino_model")
    outputs = run(torch.rand(3, 3, 640, 640))

All compute in float32 where their runtime lets them choose, so that a wrong kernel can be told from rounding.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import YAML

from rep_backbones.export.onnx_model import OnnxModel
from rep_backbones.yolo import checkpoint, formats
from rep_backbones.yolo.proof import exported_form
from rep_backbones.yolo.switches import jit_unwarned, untold

Outputs = list[Tensor]


class MissingBackend(ValueError):
    """What runs an artefact is not installed here; the message tells what to install."""


@dataclass(frozen=True)
class Runner:
    """Takes pictures `(n, c, h, w)`, float32 in [0, 1], any n; gives its outputs in float32 on the CPU.

    Attributes:
        call: the same for exactly `batch` pictures.
        device: where it computes, "cpu" or "cuda:0".
        batch: how many pictures it takes at once, if that is fixed; others are split and filled up to it.
        precision: of its kernels as they are stored, where the file tells.
        about: what its exporter noted in the file, such as "end2end".
    """

    call: Callable[[Tensor], Outputs]
    device: str = "cpu"
    batch: int | None = None
    precision: str = "fp32"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Outputs:
        with torch.no_grad():
            if self.batch in (None, len(x)):
                return self.call(x)
            parts = [self.call(_filled(part, self.batch or 1)) for part in x.split(self.batch or 1)]
        return [torch.cat(outputs)[: len(x)] for outputs in zip(*parts, strict=True)]


def runner(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", trust: bool = False) -> Runner:
    """How to run the artefact `path`, by its ending.

    Args:
        path: a .pt (multi-branch, which is not fused for it, or deploy), .onnx, .torchscript or .engine file, or a folder
            ..._openvino_model or ..._ncnn_model.
        device: of a .pt or an engine; the others compute on the CPU.
        trust: unpickle a .pt with all code that it holds.

    Raises:
        MissingBackend: its runtime is not installed.
        Refused: a .pt that is damaged or would run code.
        ValueError: another ending, or a file that its runtime does not accept.
    """
    file = Path(path)
    if file.name.endswith(".pt"):
        return model_runner(checkpoint.load_precise(file, trust=trust).model, device)
    ending = next((ending for ending in OPENERS if file.name.endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{path} cannot be run; accepted are names that end with .pt, {', '.join(OPENERS)}")
    if not file.exists():
        raise ValueError(f"{path} does not exist; give the path of an artefact")
    name, opened = OPENERS[ending]
    if reason := formats.missing(name):
        raise MissingBackend(f"{path} cannot be run here: {reason}")
    try:
        return opened(file, torch.device("cpu" if name != "engine" or str(device) == "cpu" else device))
    except Exception as error:  # each runtime has exceptions of its own
        raise ValueError(f"{path} is not accepted by what runs it ({type(error).__name__}: {error})") from error


def predictor(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", trust: bool = False
) -> Callable[[Tensor], Tensor]:
    """The predictions alone, `(n, 4 + nc + rest, anchors)` or final rows `(n, k, 6 or more)`; the rest as `runner`."""
    run = runner(path, device=device, trust=trust)
    return lambda x: run(x)[0]


def model_runner(model: nn.Module, device: str | torch.device = "cpu") -> Runner:
    """The same of an Ultralytics model, multi-branch or not: a copy, as its head answers in an export."""
    place = torch.device(device)
    form = exported_form(model.float().eval()).to(place)
    return Runner(lambda x: listed(form(x.to(place))), str(place))


def model_predictor(model: nn.Module, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The predictions alone of an Ultralytics model; the rest as `model_runner`."""
    run = model_runner(model, device)
    return lambda x: run(x)[0]


def can_run(path: Path) -> bool:
    """Whether artefacts of that name can be run where their runtime is installed."""
    return path.name.endswith((".pt", *OPENERS))


def listed(output: Any) -> Outputs:
    """One tensor or several, arrays too, as a list of float32 tensors on the CPU."""
    values = output if isinstance(output, (list, tuple)) else [output]
    return [torch.as_tensor(value).float().cpu() for value in values]


def _onnx(path: Path, device: torch.device) -> Runner:
    graph = OnnxModel(path)
    first = graph.input_shape[0]
    about = {key: _literal(value) for key, value in graph.metadata.items()}
    precision = "fp16" if graph.half else "fp32"
    return Runner(graph, batch=first if isinstance(first, int) else None, precision=precision, about=about)


def _torchscript(path: Path, device: torch.device) -> Runner:
    extra = {"config.txt": ""}
    with jit_unwarned():
        script = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
    about = json.loads(extra["config.txt"] or "{}")
    half = any(value.dtype == torch.float16 for value in script.parameters())
    precision = "fp16" if half else "fp32"
    return Runner(lambda x: listed(script(x.half() if half else x)), batch=_fixed(about), precision=precision, about=about)


def openvino_model(file: Path) -> Any:
    """A file that OpenVINO reads, compiled for the CPU in float32, with as many threads as PyTorch."""
    with untold():
        import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.Core().compile_model(openvino.Core().read_model(file), "CPU", settings)


def _openvino(path: Path, device: torch.device) -> Runner:
    compiled = openvino_model(_inside(path, "*.xml"))
    first = compiled.input().partial_shape[0]
    return Runner(
        lambda x: [torch.from_numpy(np.array(value)).float() for value in compiled(x.numpy()).values()],
        batch=None if first.is_dynamic else first.get_length(),
        about=_metadata(path),
    )


def _ncnn(path: Path, device: torch.device) -> Runner:
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    net.opt.num_threads = torch.get_num_threads()
    param = _inside(path, "*.param")
    if net.load_param(str(param)) or net.load_model(str(param.with_suffix(".bin"))):
        raise ValueError("it cannot be loaded")
    names = sorted(net.output_names())  # as Ultralytics orders them

    def one(picture: np.ndarray) -> list[np.ndarray]:
        with net.create_extractor() as extractor:
            extractor.input(net.input_names()[0], ncnn.Mat(picture).clone())
            found = [extractor.extract(name) for name in names]
            if any(status for status, _ in found):
                raise ValueError("it computes nothing for this picture")
            return [np.array(value) for _, value in found]

    def call(x: Tensor) -> Outputs:
        pictures = np.ascontiguousarray(x.numpy(), dtype=np.float32)
        return [torch.from_numpy(np.stack(values)) for values in zip(*map(one, pictures), strict=True)]

    return Runner(call, about=_metadata(path))


def _engine(path: Path, device: torch.device) -> Runner:
    place = torch.device("cuda:0") if device.type == "cpu" else device
    backend = AutoBackend(str(path), device=place)
    metadata = getattr(backend, "metadata", None) or {}
    return Runner(lambda x: listed(backend(x.to(place))), str(place), _fixed(metadata), about=metadata)


# the visible table: how a name ends -> the format, and what opens it
OPENERS: dict[str, tuple[str, Callable[[Path, torch.device], Runner]]] = {
    ".onnx": ("onnx", _onnx),
    ".torchscript": ("torchscript", _torchscript),
    "_openvino_model": ("openvino", _openvino),
    "_ncnn_model": ("ncnn", _ncnn),
    ".engine": ("engine", _engine),
}


def _filled(x: Tensor, batch: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, 0, 0, 0, batch - len(x)))


def _fixed(about: Mapping[str, Any]) -> int | None:
    dynamic = about.get("dynamic") or (about.get("args") or {}).get("dynamic")
    return None if dynamic or "batch" not in about else int(about["batch"])


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / "metadata.yaml"
    return YAML.load(file) if file.exists() else {}


def _inside(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"there is no {pattern} in it")
    return found[0]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text

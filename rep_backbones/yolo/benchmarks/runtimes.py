"""What runs a network here, for timing: each runtime gives a call that ends when its result is ready.

The CUDA ones but "PyTorch" have not been run on a GPU yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rep_backbones.export import tensorrt
from rep_backbones.export.onnx_model import session
from rep_backbones.yolo import formats
from rep_backbones.yolo.artifacts import OPSET
from rep_backbones.yolo.backends import openvino_model
from rep_backbones.yolo.switches import jit_unwarned

Call = Callable[[], object]


@dataclass(frozen=True)
class Form:
    """A network in eval mode on the device of `x`, `(n, c, h, w)`, and its ONNX file, made of the two."""

    model: nn.Module
    x: Tensor
    file: Path


def opened(
    model: nn.Module, x: Tensor, runtimes: Mapping[str, Callable[[Form], Call]]
) -> tuple[dict[str, Call], dict[str, str]]:
    """The network in each of `runtimes`, run on `x` once, and why it fails in others; it is brought to the device of `x`."""
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:  # every runtime has read the file when it is ready
        form = Form(model.eval().requires_grad_(False), x, Path(folder) / "model.onnx")
        if any(open_ in FROM_FILE for open_ in runtimes.values()):
            with jit_unwarned():
                torch.onnx.export(model.cpu(), (x.cpu(),), form.file, dynamo=False, opset_version=OPSET)
        model.to(x.device)
        for name, open_ in runtimes.items():
            try:
                call = open_(form)
                call()  # what is compiled at first use
                calls[name] = call
            except Exception as error:  # of whatever stands behind it: out of memory, an operator that it does not know
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return calls, failed


def at_hand(device: torch.device) -> tuple[dict[str, Callable[[Form], Call]], list[str]]:
    """The runtimes of the device that are installed, and why others are not there."""
    lacking = {"OpenVINO": formats.missing("openvino"), "TensorRT": tensorrt.missing()}
    wanted = CUDA if device.type == "cuda" else CPU
    there = {name: open_ for name, open_ in wanted.items() if not lacking.get(name)}
    return there, [f"{name} is not measured: {lacking[name]}" for name in wanted if lacking.get(name)]


def _eager(form: Form) -> Call:
    return partial(_finished, form.model, form.x)


def _compiled(form: Form) -> Call:
    return partial(_finished, torch.compile(form.model), form.x)


def _finished(model: Callable[[Tensor], object], x: Tensor) -> None:
    with torch.inference_mode():
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _graph(form: Form) -> Call:
    """The launches of one pass, recorded once and replayed; its input and outputs stay where they are."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(form.x.device)
    with torch.cuda.device(form.x.device), torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # PyTorch asks for some passes on another stream before
            for _ in range(3):
                form.model(form.x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = form.model(form.x)

    def call(kept: object = outputs) -> None:
        graph.replay()
        torch.cuda.synchronize(form.x.device)

    return call


def _onnx(form: Form) -> Call:
    run = session(str(form.file))
    return partial(run.run, None, {run.get_inputs()[0].name: form.x.numpy()})


def _openvino(form: Form) -> Call:
    return partial(openvino_model(form.file), [form.x.numpy()])


def _engine(form: Form) -> Call:
    """An engine of the ONNX file in float32 (TF32 where TensorRT likes it), its outputs in buffers of PyTorch."""
    import tensorrt as trt

    device = form.x.device
    with torch.cuda.device(device):
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # up to TensorRT 9
        network = builder.create_network(0 if explicit is None else 1 << int(explicit))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(form.file)):
            raise ValueError(f"TensorRT does not accept the network: {parser.get_error(0)}")
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise ValueError("TensorRT builds no engine of the network")
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        buffers = [form.x.contiguous()]
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                buffer = buffers[0]
            else:
                empty = np.empty(tuple(engine.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
                buffers.append(buffer := torch.from_numpy(empty).to(device))
            context.set_tensor_address(name, buffer.data_ptr())
        stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def call(kept: Any = (logger, runtime, engine, buffers)) -> None:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    return call


# the visible tables: name -> how a network is opened
CPU: dict[str, Callable[[Form], Call]] = {"PyTorch": _eager, "ONNX Runtime": _onnx, "OpenVINO": _openvino}
CUDA: dict[str, Callable[[Form], Call]] = {
    "PyTorch": _eager,
    "CUDA graph": _graph,
    "torch.compile": _compiled,
    "TensorRT": _engine,
}
FROM_FILE = (_onnx, _openvino, _engine)

"""An ONNX file: what its graph holds, and what ONNX Runtime computes with it."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

# Smallest absolute difference that counts: ONNX Runtime's float32 sigmoid is a polynomial that is off by up to this much at
# scores near zero, whatever the model.
RESOLUTION = 5e-7

# What keeps a branch affine, as the graph of an eval model has it; any other operator ends it.
_LINEAR = {"Conv", "BatchNormalization", "Identity", "AveragePool", "Add", "Sum", "Pad", "Dropout"}


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    """A model on the CPU, by path or as its bytes, with as many threads as PyTorch.

    They sleep between two calls: by default they wait awake for the next one, which slows down whatever runs beside them.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """A graph and its session on the CPU.

    Calling it takes a float tensor `(n, c, h, w)` and gives the list of its outputs, in the type of the file.

    Raises:
        ValueError: the file is not an ONNX model that ONNX Runtime accepts, with its reason; or it fails on an input.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.proto = onnx.load(str(path))
            self.session = session(str(path))
        except Exception as error:  # protobuf, onnx and the runtime have an exception type each
            raise ValueError(f"{path} is not a model that ONNX Runtime accepts: {error}") from error
        self._input = self.session.get_inputs()[0]
        self._half_input = "float16" in self._input.type

    def __call__(self, x: Tensor) -> list[Tensor]:
        given = x.detach().cpu().numpy().astype(np.float16 if self._half_input else np.float32)
        try:
            outputs = self.session.run(None, {self._input.name: given})
        except Exception as error:  # the runtime's exceptions have no base of their own
            raise ValueError(f"{self.path} fails on {tuple(x.shape)}: {error}") from error
        return [torch.from_numpy(value).float() for value in outputs]

    @property
    def input_shape(self) -> list[int | str]:
        """As declared: numbers, and names for dimensions that may vary."""
        return list(self._input.shape)

    @property
    def opset(self) -> int:
        return next(entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx"))

    @property
    def half(self) -> bool:
        """Whether its kernels are FP16; its inputs may be float32 then all the same."""
        return any(
            value.data_type == onnx.TensorProto.FLOAT16 and len(value.dims) > 1 for value in self.proto.graph.initializer
        )

    @cached_property
    def metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @cached_property
    def operators(self) -> Counter[str]:
        """How often each operator occurs, subgraphs of Loop and If included."""
        return Counter(node.op_type for graph in _graphs(self.proto.graph) for node in graph.node)

    @property
    def conv_nodes(self) -> int:
        return self.operators["Conv"]

    @cached_property
    def leftover_branches(self) -> list[str]:
        """The names of additions that sum affine branches of one tensor, at least one of them a convolution: what a
        multi-branch layer looks like that was exported without being fused.
        """
        graph = self.proto.graph
        makers = {name: node for node in graph.node for name in node.output}
        values = {value.name: value for value in graph.initializer}
        values |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
        constant = set(values)
        linear = {name for name, node in makers.items() if node.op_type in _LINEAR or _subsamples(node, values)}
        found = []
        for node in graph.node:
            if node.op_type not in ("Add", "Sum"):
                continue
            parts = [_sources(name, makers, linear, constant) for name in node.input if name not in constant]
            for index, (sources, convs) in enumerate(parts):
                if any(sources & others and (convs or more) for others, more in parts[index + 1 :]):
                    found.append(node.name or node.output[0])
                    break
        return found


def _sources(name: str, makers: dict[str, Any], linear: set[str], constant: set[str]) -> tuple[set[str], int]:
    """The tensors that an affine part of the graph starts from, and how many convolutions it holds."""
    found, convs, todo, seen = set(), 0, [name], set()
    while todo:
        name = todo.pop()
        if name in seen or name in constant:
            continue
        seen.add(name)
        if name not in linear:
            found.add(name)
            continue
        node = makers[name]
        convs += node.op_type == "Conv"
        todo += node.input if node.op_type in ("Add", "Sum") else node.input[:1]
    return found, convs


def _subsamples(node: Any, values: dict[str, Any]) -> bool:
    """Whether a node is `x[:, :, ::s, ::s]` of an axis: a stride without a convolution."""
    if node.op_type != "Slice" or len(node.input) < 5 or node.input[4] not in values:
        return False
    return bool((onnx.numpy_helper.to_array(values[node.input[4]]) > 1).any())


def _graphs(graph: Any) -> list[Any]:
    below = [
        inner
        for node in graph.node
        for attribute in node.attribute
        for inner in ([attribute.g] if attribute.HasField("g") else list(attribute.graphs))
    ]
    return [graph, *(found for inner in below for found in _graphs(inner))]

"""Cures for kernels that quantize badly, on an ONNX graph in float; each leaves the function (nearly) as it is.

Re-parameterized kernels have channels of very different ranges, as each batch norm that was folded scales its own.

- `equalized`: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, 4.1:
  relu(s x) = s relu(x), so a channel's scale can move from one convolution to the next. Exact.
- `clipped`: the range of each output channel that gives the smallest squared error of its weights, instead of its largest.
- `bias_corrected`: 4.2 there: what the rounding of the weights adds to a channel on average is taken off its bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from rep_backbones import affine
from rep_backbones.affine import AffineConv
from rep_backbones.export.quantize import Array, Runner

LEVELS = 127  # of symmetric int8


def equalized(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy with equal ranges at both sides of each channel between two convolutions with ReLU or nothing between them.

    Returns:
        The copy, and the number of pairs.
    """
    graph = _Graph(model)
    pairs = 0
    for first in graph.convs():
        second = graph.only_follower(first)
        if second is None or first.attribute_groups != 1 or second.attribute_groups != 1:
            continue
        a, b = graph.value(first), graph.value(second)
        out, into = a.weight.abs().amax((1, 2, 3)), b.weight.abs().amax((0, 2, 3))
        alive = (out > 0) & (into > 0)
        # s = sqrt(r1 r2) / r1, of ranges r1 and r2: both are the geometric mean afterwards
        scale = torch.where(alive, (into / out).sqrt(), torch.ones_like(out)).clamp(1e-3, 1e3)
        graph.write(first, a.scaled(scale))
        graph.write(second, affine.per_channel(1 / scale).then(_unpadded(b)))
        pairs += 1
    return graph.model, pairs


def clipped(model: onnx.ModelProto, layers: Sequence[str], steps: int = 20) -> onnx.ModelProto:
    """A copy whose kernels are cut, per output channel, at the range with the smallest error after rounding to int8."""
    graph = _Graph(model)
    for node in graph.convs():
        if node.name not in layers:
            continue
        value, flat, peak = _kernel(graph, node)
        best, error = peak.clone(), torch.full_like(peak, float("inf"))
        for step in range(steps):
            limit = peak * (1 - 0.5 * step / steps)
            found = (flat - rounded(flat, limit)).square().sum(1, keepdim=True)
            better = found < error
            best, error = torch.where(better, limit, best), torch.where(better, found, error)
        cut = torch.maximum(torch.minimum(flat, best), -best)
        graph.write(node, AffineConv(cut.reshape(value.weight.shape), value.bias, groups=value.groups))
    return graph.model


def bias_corrected(model: onnx.ModelProto, layers: Sequence[str], means: Mapping[str, Tensor]) -> onnx.ModelProto:
    """A copy whose biases make up for what rounding the kernels of `layers` to int8 adds on average.

    `means` are those of `input_means`. It is right only for layers that are then quantized.
    """
    graph = _Graph(model)
    for node in graph.convs():
        if node.name not in layers:
            continue
        value, flat, peak = _kernel(graph, node)
        lost = AffineConv((flat - rounded(flat, peak)).reshape(value.weight.shape), groups=value.groups)
        mean = means[node.input]
        response = affine.per_channel(torch.ones_like(mean), mean).then(lost).bias
        assert response is not None  # a constant went in
        graph.write(node, value.shifted(response))
    return graph.model


def _kernel(graph: _Graph, node: _Conv) -> tuple[AffineConv, Tensor, Tensor]:
    """A layer's value, its kernel with a row for each output channel, and the largest absolute entry of each."""
    value = graph.value(node)
    flat = value.weight.flatten(1)
    return value, flat, flat.abs().amax(1, keepdim=True).clamp_min(1e-30)


def rounded(values: Tensor, limit: Tensor) -> Tensor:
    """Values as symmetric int8 with the range `limit` stores them."""
    scale = limit / LEVELS
    return (values / scale).round().clamp(-LEVELS - 1, LEVELS) * scale


def _unpadded(value: AffineConv) -> AffineConv:
    # a scale in front of zero padding commutes with it, so the padding, which stays on the node, is of no concern here
    return AffineConv(value.weight, value.bias, groups=value.groups)


def input_means(model: onnx.ModelProto, pictures: Iterable[Array]) -> Mapping[str, Tensor]:
    """The mean of what enters each convolution, by tensor, per channel `(c1,)`, over pictures and pixels."""
    observed = copy.deepcopy(model)
    wanted = list(dict.fromkeys(node.input for node in _Graph(model).convs()))
    known = {value.name for value in (*observed.graph.output, *observed.graph.input)}
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    run, totals, count = Runner(observed), {name: 0.0 for name in wanted}, 0
    places = {value.name: index for index, value in enumerate(observed.graph.output)}
    source = observed.graph.input[0].name
    sums: dict[str, Any] = dict(totals)
    for x in pictures:
        outputs = run(x)
        count += 1
        for name in wanted:
            tensor = x if name == source else outputs[places[name]]
            sums[name] = sums[name] + tensor.mean(axis=(0, 2, 3), dtype=np.float64)
    return {name: torch.from_numpy(np.asarray(sums[name] / count)) for name in wanted}


class _Conv:
    """A Conv node with constant weights."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.node, self.name, self.input, self.output = node, node.name, node.input[0], node.output[0]
        self.weight, self.bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
        groups = [attribute.i for attribute in node.attribute if attribute.name == "group"]
        self.attribute_groups = groups[0] if groups else 1


class _Graph:
    """A copy of a model, whose kernels can be read as values of the algebra and written back."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = copy.deepcopy(model)
        graph = self.model.graph
        self._values = {value.name: value for value in graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._kept = {value.name for value in graph.output}

    def convs(self) -> list[_Conv]:
        nodes = [n for n in self.model.graph.node if n.op_type == "Conv" and n.input[1] in self._values]
        own = [n for n in nodes if all(len(self._users[name]) == 1 for name in n.input[1:] if name)]
        return [_Conv(n) for n in own]

    def only_follower(self, conv: _Conv) -> _Conv | None:
        """The convolution that alone takes this one's output, through ReLU or directly."""
        name = conv.output
        for _ in range(2):
            users = self._users.get(name, [])
            if len(users) != 1 or name in self._kept:
                return None
            (user,) = users
            if user.op_type == "Conv" and user.input[0] == name and user.input[1] in self._values:
                return next((c for c in self.convs() if c.name == user.name), None)
            if user.op_type != "Relu":
                return None
            name = user.output[0]
        return None

    def value(self, conv: _Conv) -> AffineConv:
        """Kernel, bias and groups in float64; stride and padding stay on the node."""
        bias = torch.from_numpy(numpy_helper.to_array(self._values[conv.bias]).astype(np.float64)) if conv.bias else None
        weight = torch.from_numpy(numpy_helper.to_array(self._values[conv.weight]).astype(np.float64))
        return AffineConv(weight, bias, groups=conv.attribute_groups)

    def write(self, conv: _Conv, value: AffineConv) -> None:
        self._store(conv.weight, value.weight)
        if value.bias is None:
            return
        if not conv.bias:
            conv.bias = f"{conv.name}_bias"
            conv.node.input.append(conv.bias)
            self._values[conv.bias] = self.model.graph.initializer.add(name=conv.bias)
            self._users[conv.bias] = [conv.node]
        self._store(conv.bias, value.bias)

    def _store(self, name: str, tensor: Tensor) -> None:
        self._values[name].CopyFrom(numpy_helper.from_array(tensor.numpy().astype(np.float32), name))

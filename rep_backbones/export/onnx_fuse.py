"""Fusing a graph of which only the ONNX file is there: branches that sum to a convolution become that convolution.

From each affine node the graph is followed back to a tensor that all its branches start from. What lies between is one
affine map; the algebra gives its kernel, in float64, or says why it has none. It is put in place of the nodes if the graph
has then fewer of them, no more convolutions and no more multiplications.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from rep_backbones import affine
from rep_backbones.affine import AffineConv, AlgebraError
from rep_backbones.export.onnx_affine import OPERATORS, Attributes, Input

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


@dataclass(frozen=True)
class Fused:
    """One convolution and what it stands for.

    Attributes:
        output: the tensor that it computes.
        source: the tensor that it starts from.
        nodes, convs: how many nodes, and convolutions among them, are gone.
        macs: multiplications for each output of the source's pixel before, and after.
    """

    output: str
    source: str
    nodes: int
    convs: int
    macs: tuple[float, float]
    value: AffineConv

    def __str__(self) -> str:
        (kh, kw), groups = self.value.kernel_size, f", {self.value.groups} groups" if self.value.groups > 1 else ""
        return (
            f"{self.output}: {self.nodes} nodes with {self.convs} convolutions -> 1, kernel {kh}x{kw}{groups}, "
            f"{self.value.in_channels} -> {self.value.out_channels} channels"
        )


@torch.no_grad()
def fuse_onnx(model: ModelProto) -> tuple[ModelProto, list[Fused]]:
    """A copy of the model with one convolution for each affine part of several nodes, and what was fused.

    Names of inputs and outputs, metadata, and every other node stay as they are. Kernels are folded in float64 and stored in
    the type that they had.

    Raises:
        ValueError: the graph holds NaN or inf in a kernel that would be merged.
    """
    model = copy.deepcopy(model)
    graph = _Graph(model)
    found: list[Fused] = []
    for index in reversed(range(len(graph.nodes))):
        if index not in graph.removed and (best := _best(graph, index)):
            found.append(best)
            graph.replace(index, best)
    graph.write()
    return model, found[::-1]


class _Graph:
    """The nodes of a model and who uses what."""

    def __init__(self, model: ModelProto) -> None:
        self.proto = model.graph
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.makers = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        given = {value.name for value in model.graph.input}  # a constant that a caller may replace is none
        self._stored = {value.name: value for value in model.graph.initializer if value.name not in given}
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        for node in self.nodes:
            if _may_be_constant(node) and all(name in self._stored for name in node.input if name):
                self._stored |= _computed(node, self._stored, opsets)
        self._constants: dict[str, Tensor] = {}
        self._channels = _channels(model)
        self.users: dict[str, set[int]] = defaultdict(set)
        for i, node in enumerate(self.nodes):
            for name in (*node.input, *_used_inside(node)):
                self.users[name].add(i)
        for output in model.graph.output:
            self.users[output.name].add(len(self.nodes))  # the caller, who stays
        self.removed: set[int] = set()

    def is_constant(self, name: str) -> bool:
        return name in self._stored

    def constant(self, name: str) -> Tensor:
        """In float64."""
        if name not in self._constants:
            array = numpy_helper.to_array(self._stored[name])
            self._constants[name] = torch.from_numpy(np.array(array, dtype=np.float64))
        return self._constants[name]

    def is_conv(self, index: int) -> bool:
        """Whether a node is a convolution with a kernel that is known."""
        node = self.nodes[index]
        return node.op_type == "Conv" and self.is_constant(node.input[1])

    def kernel_numbers(self, index: int) -> int:
        return prod(self._stored[self.nodes[index].input[1]].dims)

    def data(self, index: int) -> list[str]:
        """The inputs of a node that are no constants."""
        return [name for name in self.nodes[index].input if name and not self.is_constant(name)]

    def is_affine(self, name: str) -> bool:
        """Whether a tensor is made by an operator that may be affine."""
        index = self.makers.get(name)
        if index is None:
            return False
        node = self.nodes[index]
        return node.op_type in OPERATORS and node.domain in ("", "ai.onnx") and node.output[0] == name

    def channels(self, name: str) -> int:
        if name in self._channels:
            return self._channels[name]
        for index in sorted(self.users[name] - {len(self.nodes)}):
            node = self.nodes[index]
            if node.op_type == "Conv" and node.input[0] == name and self.is_constant(node.input[1]):
                return int(self._stored[node.input[1]].dims[1]) * int(Attributes(node).get("group", 1))
            if node.op_type == "BatchNormalization" and self.is_constant(node.input[1]):
                return int(self._stored[node.input[1]].dims[0])
        raise AlgebraError(f"the number of channels of {name} is not known")

    def replace(self, index: int, fused: Fused) -> None:
        """Put a convolution in the place of a node; what only that node needed goes with it."""
        gone = _freed(self, index, fused.source)
        kind = next(self._stored[self.nodes[i].input[1]].data_type for i in gone if self.is_conv(i))
        for i in gone:
            for name in self.nodes[i].input:
                self.users[name].discard(i)
                self._constants.pop(name, None)
        self.removed |= gone
        value = fused.value
        names = [f"{fused.output}.weight", *([f"{fused.output}.bias"] if value.bias is not None else [])]
        for name, tensor in zip(names, (value.weight, value.bias)):
            assert tensor is not None
            array = tensor.numpy().astype(helper.tensor_dtype_to_np_dtype(kind))
            if not np.isfinite(array).all():
                raise ValueError(
                    f"the merged kernel at {fused.output} is not finite: there is NaN or inf in the file's weights"
                )
            self.proto.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        self.nodes[index] = helper.make_node(
            "Conv",
            [fused.source, *names],
            [fused.output],
            name=self.nodes[index].name or fused.output,
            kernel_shape=value.kernel_size,
            strides=value.stride,
            pads=[*value.padding, *value.padding],
            dilations=value.dilation,
            group=value.groups,
        )
        self.removed.discard(index)
        self.users[fused.source].add(index)

    def write(self) -> None:
        """Give the model its nodes, without the constants that nobody uses any more."""
        used = {output.name for output in self.proto.output}
        kept: list[NodeProto] = []
        for i, node in reversed(list(enumerate(self.nodes))):
            idle = all(name in self._stored and name not in used for name in node.output)
            if i not in self.removed and not idle:
                used |= {*node.input, *_used_inside(node)}
                kept.insert(0, node)
        made = {name for node in kept for name in node.output}
        for stored in [each for each in self.proto.initializer if each.name not in used]:
            self.proto.initializer.remove(stored)
        for known in [each for each in self.proto.value_info if each.name not in made]:
            self.proto.value_info.remove(known)
        del self.proto.node[:]
        self.proto.node.extend(kept)


def _may_be_constant(node: NodeProto) -> bool:
    inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return node.domain in ("", "ai.onnx") and node.op_type not in _RANDOM and not inner


def _computed(node: NodeProto, known: Mapping[str, TensorProto], opsets: Mapping[str, int]) -> dict[str, TensorProto]:
    """The outputs of a node whose inputs are constants; none for one that onnx's reference does not know.

    Exporters write the widths of a padding, for one, as an arithmetic of constants.
    """
    try:
        inputs = {name: numpy_helper.to_array(known[name]) for name in node.input if name}
        outputs = ReferenceEvaluator(node, opsets=dict(opsets)).run(None, inputs)
        return {name: numpy_helper.from_array(np.asarray(value), name) for name, value in zip(node.output, outputs) if name}
    except Exception:  # of any of some two hundred operators; the node is then what it was
        return {}


def _used_inside(node: NodeProto) -> Iterator[str]:
    """Tensors that the subgraphs of an If, Loop or Scan take from around them (and their own, which does no harm)."""
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                yield from inner.input
                yield from _used_inside(inner)
            yield from (output.name for output in graph.output)


def _channels(model: ModelProto) -> dict[str, int]:
    """Of each tensor of four dimensions whose shape can be inferred, the number of channels."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # over 2 GB, or an operator of another domain: what uses a tensor tells then
        graph = model.graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[1].dim_value > 0:
            found[value.name] = dims[1].dim_value
    return found


# ---- what to fuse ---------------------------------------------------------------------------------------------------------


def _best(graph: _Graph, index: int) -> Fused | None:
    """The convolution that saves most in the place of a node, if any does."""
    output = graph.nodes[index].output[0] if graph.nodes[index].output else ""
    if not graph.is_affine(output):
        return None
    region = _region(graph, output)
    budget = 2.0 * sum(graph.kernel_numbers(i) for i in region if graph.is_conv(i))
    best: Fused | None = None
    for source in _sources(graph, output, region) if budget else []:
        try:
            values = _Values(graph, source, budget)
            value = values.of(output)
        except AlgebraError:
            continue
        found = _gain(graph, index, values, value)
        if found and (best is None or _saved(found) > _saved(best)):
            best = found
    return best


def _saved(fused: Fused) -> tuple[float, int]:
    return fused.macs[0] - fused.macs[1], fused.nodes


def _region(graph: _Graph, output: str) -> list[int]:
    """The affine nodes that lead to a tensor, in the order of the graph."""
    found: set[int] = set()
    todo = [output]
    while todo:
        name = todo.pop()
        if graph.is_affine(name) and graph.makers[name] not in found:
            found.add(graph.makers[name])
            todo += graph.data(graph.makers[name])
    return sorted(found)


def _sources(graph: _Graph, output: str, region: list[int]) -> list[str]:
    """The tensors of a region through which every way to `output` leads, the nearest first."""
    names = dict.fromkeys(name for i in region for name in graph.data(i))
    order = sorted(names, key=lambda name: graph.makers.get(name, -1), reverse=True)
    return [name for name in order if _leads_through(graph, output, name)]


def _leads_through(graph: _Graph, output: str, source: str) -> bool:
    todo, seen = [output], {source}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if not graph.is_affine(name):
            return False
        todo += graph.data(graph.makers[name])
    return True


class _Values:
    """The tensors of a region as values over one source."""

    def __init__(self, graph: _Graph, source: str, budget: float) -> None:
        self.graph, self.budget = graph, budget
        self.known = {source: affine.identity(graph.channels(source), torch.ones(0, dtype=torch.float64))}
        self.source = source

    def of(self, output: str) -> AffineConv:
        """In float64.

        Raises:
            AlgebraError: there is no such value, or it is much larger than the nodes that it stands for.
        """
        todo = [output]
        while todo:  # not by recursion: a graph may be a thousand nodes deep
            name = todo[-1]
            missing = [each for each in self.graph.data(self.graph.makers[name]) if each not in self.known]
            if name in self.known:
                todo.pop()
            elif missing:
                todo += missing
            else:
                self.known[name] = self._computed(self.graph.nodes[self.graph.makers[name]])
        return self.known[output]

    def _computed(self, node: NodeProto) -> AffineConv:
        inputs: list[Input] = [
            None if not name else self.graph.constant(name) if self.graph.is_constant(name) else self.known[name]
            for name in node.input
        ]
        self._refuse_growth(inputs)
        return OPERATORS[node.op_type](Attributes(node), inputs)

    def _refuse_growth(self, inputs: list[Input]) -> None:
        """Two convolutions in series may make a kernel that is larger than both: not even computed then."""
        x, weight = inputs[0], inputs[1] if len(inputs) > 1 else None
        if isinstance(x, AffineConv) and isinstance(weight, Tensor) and weight.dim() == 4:
            (kh, kw), (jh, jw) = x.kernel_size, weight.shape[2:]
            groups = gcd(x.groups, x.out_channels // weight.shape[1]) if weight.shape[1] else 1
            if weight.shape[0] * (x.in_channels // groups) * (kh + jh - 1) * (kw + jw - 1) > max(self.budget, 1.0):
                raise AlgebraError("the merged kernel would be larger than those it stands for")


def _gain(graph: _Graph, index: int, values: _Values, value: AffineConv) -> Fused | None:
    """What replacing a node by `value` saves; None if that is nothing, or if it costs something else."""
    gone = _freed(graph, index, values.source)
    convs = sum(graph.is_conv(i) for i in gone)
    before = sum(_macs(graph, i, values) for i in gone)
    after = value.weight.numel() / (value.stride[0] * value.stride[1])
    if not convs or len(gone) < 2 or after > before:
        return None
    return Fused(graph.nodes[index].output[0], values.source, len(gone), convs, (before, after), value)


def _macs(graph: _Graph, index: int, values: _Values) -> float:
    """Multiplications of a node for each pixel of the source."""
    node = graph.nodes[index]
    sh, sw = values.known[node.output[0]].stride
    if graph.is_conv(index):
        return graph.kernel_numbers(index) / (sh * sw)
    if node.op_type == "AveragePool":
        kh, kw = Attributes(node).pair("kernel_shape")
        return values.known[node.output[0]].out_channels * kh * kw / (sh * sw)
    return 0.0


def _freed(graph: _Graph, index: int, source: str) -> set[int]:
    """The nodes that nobody needs once `index` is computed from `source`, `index` itself among them."""
    freed = {index}
    todo = graph.data(index)
    while todo:
        name = todo.pop()
        if name == source or not graph.is_affine(name):
            continue
        maker = graph.makers[name]
        if maker not in freed and graph.users[name] <= freed:
            freed.add(maker)
            todo += graph.data(maker)
    return freed

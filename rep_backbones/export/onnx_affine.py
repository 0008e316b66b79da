"""The operators of an ONNX graph that are affine, as values of the algebra.

The visible table is OPERATORS: operator -> a function of the node and its inputs. An input is a value, or a constant tensor.
A node that computes something else in its setting (ceil mode, other padding, dynamic weights) raises `AlgebraError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from math import gcd, prod
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from rep_backbones import affine
from rep_backbones.affine import AffineConv, AlgebraError, Pair

Input = AffineConv | Tensor | None  # None: an optional input that is not given
Operator = Callable[["Attributes", Sequence[Input]], AffineConv]


class Attributes(dict[str, Any]):
    """The attributes of a node by name, as Python values."""

    def __init__(self, node: onnx.NodeProto) -> None:
        super().__init__({a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})

    def pair(self, name: str, default: int = 1) -> Pair:
        given = self.get(name) or [default, default]
        if len(given) != 2:
            raise AlgebraError(f"{name}={list(given)}: only two-dimensional layers are fused")
        return given[0], given[1]

    def padding(self, extent: Pair) -> Pair:
        """Zeros on each side, (height, width), of a window of that extent in pixels."""
        kind = self.get("auto_pad", b"NOTSET").decode()
        if kind == "VALID":
            return 0, 0
        if kind.startswith("SAME"):
            if self.pair("strides") != (1, 1) or any(e % 2 == 0 for e in extent):
                raise AlgebraError(f"auto_pad={kind} pads one side more than the other for some sizes")
            return extent[0] // 2, extent[1] // 2
        return symmetric(self.get("pads") or [0, 0, 0, 0])


def symmetric(pads: Sequence[int]) -> Pair:
    """`[top, left, bottom, right]` as (height, width).

    Raises:
        AlgebraError: where opposite sides differ, which no convolution does.
    """
    if len(pads) != 4 or pads[0] != pads[2] or pads[1] != pads[3]:
        raise AlgebraError(f"padding {list(pads)} differs between opposite sides, which no convolution does")
    return pads[0], pads[1]


def _value(given: Input) -> AffineConv:
    if not isinstance(given, AffineConv):
        raise AlgebraError("the input is a constant where data was expected")
    return given


def _constant(given: Input, what: str) -> Tensor:
    if not isinstance(given, Tensor):
        raise AlgebraError(f"the {what} is computed, so the layer is another one for each picture")
    return given


def _per_channel(constant: Tensor, channels: int) -> Tensor:
    """A constant that is broadcast over pictures and pixels, as `(channels,)`."""
    shape = (1,) * (4 - constant.dim()) + tuple(constant.shape)
    if len(shape) != 4 or prod(shape) != shape[1] or shape[1] not in (1, channels):
        raise AlgebraError(f"a constant of shape {tuple(constant.shape)} is not one number for each of {channels} channels")
    return constant.reshape(-1).expand(channels)


def _conv(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    x, weight, bias = _value(inputs[0]), _constant(inputs[1], "kernel"), inputs[2] if len(inputs) > 2 else None
    if weight.dim() != 4:
        raise AlgebraError("only two-dimensional convolutions are fused")
    dilation = node.pair("dilations")
    value = AffineConv(
        weight,
        None if bias is None else _constant(bias, "bias"),
        node.pair("strides"),
        dilation=dilation,
        groups=node.get("group", 1),
    )
    value = replace(value, padding=node.padding(value.extent))
    return x.then(value, regroup=True)


def _batch_norm(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    x = _value(inputs[0])
    if node.get("training_mode"):
        raise AlgebraError("batch normalization in training mode depends on its batch")
    weight, bias, mean, var = (_constant(given, "norm") for given in inputs[1:5])
    norm = nn.BatchNorm2d(len(mean), eps=node.get("epsilon", 1e-5), dtype=torch.float64)
    norm.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
    return x.then(affine.batch_norm(norm))


def _add(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    values = [given for given in inputs if isinstance(given, AffineConv)]
    groups = gcd(*(value.groups for value in values))
    # the smallest first: what is embedded in a large kernel is then the sum of all small ones, once
    ordered = sorted((value.regrouped(groups) for value in values), key=lambda value: value.kernel_size)
    total = reduce(AffineConv.__add__, ordered)
    for given in inputs:
        if isinstance(given, Tensor):
            total = _shifted(total, _per_channel(given, total.out_channels))
    return total


def _shifted(value: AffineConv, constant: Tensor) -> AffineConv:
    """`value + constant`; what cancels but for float32's rounding is no bias at all, and may be padded with zeros.

    So do graphs that pad with a layer's own bias: they subtract it, pad with zeros, and add it again.
    """
    shifted = value.shifted(constant)
    if value.bias is None or shifted.bias is None:
        return shifted
    rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(value.bias.abs().max(), constant.abs().max())
    return replace(shifted, bias=None) if shifted.bias.abs().max() <= rounding else shifted


def _subtract(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    minus = torch.full((1,), -1.0, dtype=torch.float64)
    second = inputs[1]
    return _add(node, [inputs[0], second.scaled(minus) if isinstance(second, AffineConv) else _constant(second, "") * minus])


def _multiply(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    value = next(given for given in inputs if isinstance(given, AffineConv))
    factor = _constant(next((given for given in inputs if given is not value), None), "factor")
    return value.scaled(_per_channel(factor, value.out_channels))


def _divide(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    return _multiply(node, [_value(inputs[0]), 1 / _constant(inputs[1], "divisor")])


def _average_pool(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    x, kernel = _value(inputs[0]), node.pair("kernel_shape")
    padding = node.padding(kernel)
    if node.get("ceil_mode") or (any(padding) and not node.get("count_include_pad")) or node.pair("dilations") != (1, 1):
        raise AlgebraError("average pooling is a convolution only where it counts its padding, and rounds sizes down")
    return x.then(affine.average_pool(x.out_channels, kernel, node.pair("strides"), padding, x.weight), regroup=True)


def _concat(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    if node.get("axis") not in (1, -3):
        raise AlgebraError("a concatenation is affine on the channels only")
    return affine.concat([_value(given).dense() for given in inputs])


def _pad(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    x, given = _value(inputs[0]), (*inputs[1:], None, None, None)
    if node.get("mode", b"constant") != b"constant" or (given[1] is not None and bool(_constant(given[1], "fill").any())):
        raise AlgebraError("only padding with zeros is a convolution")
    pads = node["pads"] if "pads" in node else _constant(given[0], "padding").to(torch.int64).tolist()
    axes = (
        [axis % 4 for axis in _constant(given[2], "axes").to(torch.int64).tolist()] if given[2] is not None else [0, 1, 2, 3]
    )
    sides = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if any(any(sides.get(axis, (0, 0))) for axis in (0, 1)):
        raise AlgebraError("only the sides of a picture may be padded")
    (top, bottom), (left, right) = (sides.get(axis, (0, 0)) for axis in (2, 3))
    padding = symmetric([top, left, bottom, right])
    return x.then(replace(affine.identity(x.out_channels, x.weight), padding=padding))


def _slice(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    """`x[:, :, ::sh, ::sw]`."""
    x, given = _value(inputs[0]), (*inputs[1:], None, None)
    if len(inputs) < 3:
        raise AlgebraError("a slice of constant attributes is not read")
    starts, ends = (_constant(each, "range").tolist() for each in given[:2])
    axes = _constant(given[2], "axes").tolist() if given[2] is not None else list(range(len(starts)))
    steps = _constant(given[3], "steps").tolist() if given[3] is not None else [1] * len(starts)
    stride = {2: 1, 3: 1}
    for start, end, axis, step in zip(starts, ends, axes, steps):
        if start or end < 2**31 - 1 or step < 1 or (axis % 4 not in stride and step > 1):
            raise AlgebraError("only every n-th row and column, from the first one to the last, is a convolution")
        if axis % 4 in stride:
            stride[int(axis) % 4] = int(step)
    return x.then(affine.subsample(x.out_channels, (stride[2], stride[3]), x.weight))


def _identity(node: Attributes, inputs: Sequence[Input]) -> AffineConv:
    return _value(inputs[0])


OPERATORS: dict[str, Operator] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Add": _add,
    "Sum": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "AveragePool": _average_pool,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Identity": _identity,
    "Dropout": _identity,
}

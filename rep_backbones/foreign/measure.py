"""Measuring: the kernel of an affine, shift-equivariant map is its response to impulses, and its bias that to zeros.

What is found is a hypothesis: `prove.py` decides. The map is asked on small pictures in float64, one input channel of each
group at a time, as many at once as fit into the memory that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_backbones.affine import AffineConv, Pair
from rep_backbones.foreign.cost import cost, is_picture

Map = Callable[[Tensor], Tensor]  # (n, c1, h, w) -> (n, c2, h', w')
MEMORY = 512 << 20  # bytes
SIDES = (8, 16, 32, 64, 128)  # of the pictures that are tried, in pixels: the largest shows kernels of over 100
MAX_STRIDE = 16
TILED = 32  # pixels, of a picture that holds several impulses
EPS = torch.finfo(torch.float64).eps


class NotAConvolution(ValueError):
    """Something is not a convolution: why."""


@dataclass(frozen=True)
class _Axis:
    """Of height or width: an output pixel i sees the input pixels `i * stride - padding + tap`, `0 <= tap < extent`."""

    stride: int
    padding: int
    extent: int

    @property
    def impulse(self) -> int:
        """The first pixel whose impulse reaches all taps inside the picture; with it, so do the next `stride - 1`."""
        return max(0, self.extent - 1 - self.padding)

    @property
    def side(self) -> int:
        """The smallest picture that shows all of that."""
        last = self.impulse + self.stride - 1
        outputs = (last + self.padding) // self.stride + 1
        return max(last + 1, (outputs - 1) * self.stride + self.extent - 2 * self.padding)

    def outputs(self, pixel: int) -> tuple[list[int], list[int]]:
        """The outputs that see a pixel, and with which of their taps."""
        first = -(-(pixel + self.padding - self.extent + 1) // self.stride)
        seen = list(range(max(first, 0), (pixel + self.padding) // self.stride + 1))
        return seen, [pixel - i * self.stride + self.padding for i in seen]


def measured(f: Map, channels: int, memory: int = MEMORY, weights: int | None = None) -> AffineConv:
    """The convolution that `f` is if it is one, in float64.

    Args:
        f: `(n, channels, h, w)` -> `(n, c2, h', w')` in float64, for pictures of any size from some size on.
        channels: of its input.
        memory: bytes that its intermediate results may take at once; one picture at a time needs what it needs.
        weights: that the kernel may have at most; more are not worth measuring.

    Raises:
        NotAConvolution: its answers can't be those of a convolution, or of none that small.
    """
    with torch.no_grad():
        first, strides, slacks = _sizes(f, channels)
        constant = _constant(answer(f, torch.zeros(1, channels, first, first, dtype=torch.float64)))
        for side in [s for s in SIDES if s >= first]:
            taps, loudness = _footprint(f, channels, side, strides, constant)
            if not all(taps) and side < SIDES[-1]:
                continue
            axes = [_axis(found or [0], s, q) for found, s, q in zip(taps, strides, slacks)]
            x = torch.randn(1, channels, *(axis.side + 12 for axis in axes), dtype=torch.float64, generator=_random(1))
            for groups in sorted({_groups(f, channels, axes, constant), 1}, reverse=True):
                fewest = len(constant) * (channels // groups) * math.prod(_count(found or [0]) for found in taps)
                if weights is not None and fewest > weights:
                    raise NotAConvolution("as one convolution it would take more FLOPs")
                value = _kernel(f, channels, axes, constant, groups, loudness, memory)
                if _near(answer(f, x), value(x)):
                    return value.tightened()
    raise NotAConvolution("no kernel explains its answers: it is not linear, or sees too many pixels, or not all alike")


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answer(f: Map, x: Tensor) -> Tensor:
    """`f(x)` in float64, without a graph.

    Raises:
        NotAConvolution: it fails, or gives anything but as many pictures.
    """
    try:
        with torch.no_grad():
            y = f(x)
    except Exception as error:  # whatever other people's code raises
        size = f"{x.shape[2]}x{x.shape[3]}"
        raise NotAConvolution(f"it fails on a picture of {size} ({type(error).__name__}: {_line(error)})") from error
    if not is_picture(y) or y.shape[0] != x.shape[0]:
        raise NotAConvolution("it does not make pictures of pictures")
    return y.double()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


def _sizes(f: Map, channels: int) -> tuple[int, list[int], list[int]]:
    """A side that works, and per axis the stride and what padding adds: `out = (in + slack) // stride + 1`."""
    for side in SIDES[:3]:
        try:
            return side, *_growth(f, channels, side)
        except NotAConvolution as error:
            refused = error
    raise refused


def _growth(f: Map, channels: int, side: int) -> tuple[list[int], list[int]]:
    outs: list[Pair] = []
    for n in range(side, side + 2 * MAX_STRIDE + 1):
        h, w = answer(f, torch.zeros(1, channels, n, n, dtype=torch.float64)).shape[2:]
        outs.append((h, w))
        if all(len(_steps([o[axis] for o in outs])) >= 2 for axis in (0, 1)):
            break
    strides, slacks = [], []
    for axis in (0, 1):
        sizes = [o[axis] for o in outs]
        steps = _steps(sizes)
        if len(steps) < 2:
            raise NotAConvolution("the size of its output does not grow with that of its input")
        stride = steps[1] - steps[0]
        slack = (sizes[steps[0]] - 1) * stride - (side + steps[0])
        if any(size != (side + i + slack) // stride + 1 for i, size in enumerate(sizes)):
            raise NotAConvolution("the size of its output is not that of any convolution's")
        strides.append(stride)
        slacks.append(slack)
    return strides, slacks


def _steps(sizes: list[int]) -> list[int]:
    return [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]


def _constant(y: Tensor) -> Tensor:
    """The bias `(c2,)` in an answer to zeros, the same at every pixel."""
    if not y.isfinite().all():
        raise NotAConvolution("it answers zeros with NaN or inf")
    bias = y[0].flatten(1).mean(1) if y[0, 0].numel() else y.new_zeros(y.shape[1])
    if (y[0].flatten(1) - bias[:, None]).abs().max() > 1e-11 * bias.abs().max():
        raise NotAConvolution(
            "its answer to zeros differs from pixel to pixel: a position is added, or zeros are padded behind a bias"
        )
    return y[0, :, y.shape[2] // 2, y.shape[3] // 2].clone()


def _footprint(f: Map, channels: int, side: int, strides: list[int], constant: Tensor) -> tuple[list[list[int]], float]:
    """Which pixels an output sees, from an impulse of random channels, and how loud an impulse is to be.

    Per axis all `pixel - output * stride`, none where nothing answers, or something at the border.
    """
    amplitudes = torch.randn(channels, dtype=torch.float64, generator=_random(0))
    pixels = [(side // 2 + a, side // 2 + b) for a in range(strides[0]) for b in range(strides[1])]
    x = torch.zeros(len(pixels), channels, side, side, dtype=torch.float64)
    for n, (row, column) in enumerate(pixels):
        x[n, :, row, column] = amplitudes
    response = (answer(f, x) - constant.reshape(-1, 1, 1)).abs()
    peak, floor = float(response.max()), 64 * EPS * constant.abs().reshape(-1, 1, 1)
    seen = (response > 1e-13 * peak + floor).any(1)  # (pixels, h', w')
    taps = [_taps(seen.any(2 - axis), [pixel[axis] for pixel in pixels], strides[axis]) for axis in (0, 1)]
    louder = math.log2(float(constant.abs().max()) / peak) if peak and constant.any() else 0
    return taps, 2.0 ** max(0, math.ceil(louder))


def _taps(seen: Tensor, pixels: list[int], stride: int) -> list[int]:
    hits = [(pixels[n], i) for n, i in seen.nonzero().tolist()]
    at_border = any(i in (0, seen.shape[1] - 1) for _, i in hits)
    return [] if at_border else sorted({pixel - i * stride for pixel, i in hits})


def _count(taps: list[int]) -> int:
    """How many taps a kernel has along an axis, those between `taps` that its dilation does not pass over too."""
    return (taps[-1] - taps[0]) // (math.gcd(*(t - taps[0] for t in taps)) or 1) + 1


def _axis(taps: list[int], stride: int, slack: int) -> _Axis:
    """The smallest symmetric padding whose kernel covers the taps: `slack = 2 * padding - extent`."""
    padding = max(0, -(-(slack + 1) // 2), -taps[0], taps[-1] + slack + 1)
    return _Axis(stride, padding, 2 * padding - slack)


def _groups(f: Map, channels: int, axes: list[_Axis], constant: Tensor) -> int:
    """How many groups there seem to be, judged by the outputs that three of the channels reach."""
    size, c2 = [axis.side for axis in axes], len(constant)
    groups = math.gcd(channels, c2)
    for channel in sorted({0, channels // 2, channels - 1}):
        x = torch.zeros(1, channels, *size, dtype=torch.float64)
        x[:, channel] = torch.randn(size, dtype=torch.float64, generator=_random(channel))
        response = (answer(f, x)[0] - constant.reshape(-1, 1, 1)).abs().amax((1, 2))
        reached = (response > 64 * EPS * (constant.abs() + response.max())).nonzero().flatten().tolist()
        while groups > 1 and any(o * groups // c2 != channel * groups // channels for o in reached):
            groups -= 1
            while channels % groups or c2 % groups:
                groups -= 1
    return groups


def _kernel(
    f: Map, channels: int, axes: list[_Axis], constant: Tensor, groups: int, loudness: float, memory: int
) -> AffineConv:
    rows, columns = axes
    inner, c2 = channels // groups, len(constant)
    # several impulses in one picture, out of each other's reach: large pictures are faster than many small ones
    steps = [-(-axis.extent // axis.stride) * axis.stride for axis in axes]
    tiles = [(y, x) for y in range(max(1, TILED // steps[0])) for x in range(max(1, TILED // steps[1]))][:inner]
    height, width = (axis.side + max(tile[n] for tile in tiles) * steps[n] for n, axis in enumerate(axes))
    one = torch.zeros(1, channels, height, width, dtype=torch.float64)
    each = cost(lambda: answer(f, one)).bytes + one.numel() * one.element_size()
    at_once = max(1, memory // each) * len(tiles)
    weight = torch.zeros(c2, inner, rows.extent, columns.extent, dtype=torch.float64)
    for start in range(0, inner, at_once):
        chunk = range(start, min(start + at_once, inner))
        places = [(n // len(tiles), *tiles[n % len(tiles)]) for n in range(len(chunk))]
        for a, b in ((a, b) for a in range(rows.stride) for b in range(columns.stride)):
            x = one.new_zeros(places[-1][0] + 1, *one.shape[1:])
            for channel, (n, row, column) in zip(chunk, places):
                x[n, channel::inner, rows.impulse + a + row * steps[0], columns.impulse + b + column * steps[1]] = loudness
            response = (answer(f, x) - constant.reshape(-1, 1, 1)) / loudness
            (up, top), (across, left) = rows.outputs(rows.impulse + a), columns.outputs(columns.impulse + b)
            for channel, (n, row, column) in zip(chunk, places):
                i = [out + row * steps[0] // rows.stride for out in up]
                j = [out + column * steps[1] // columns.stride for out in across]
                found = response[n][:, i][:, :, j]  # (c2, taps, taps)
                for tap, line in zip(top, found.unbind(1)):
                    weight[:, channel, tap, left] = line
    size = weight.abs().amax((1, 2, 3), keepdim=True) + constant.abs().reshape(-1, 1, 1, 1) / loudness
    weight[weight.abs() <= 32 * EPS * size] = 0  # what rounding leaves of a zero
    return AffineConv(
        weight,
        constant if constant.any() else None,
        (rows.stride, columns.stride),
        (rows.padding, columns.padding),
        groups=groups,
    )


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-9 * a.abs().max())

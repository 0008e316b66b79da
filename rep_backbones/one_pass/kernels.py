"""The passes of `function.JointNorm` as Triton kernels, each over all branches at once.

A program takes some channels and a run of tiles; a tile lies within one picture. Both layouts are read in order: a tile is a
run of pixels of one channel, or in channels_last of pixels with a run of channels. What is computed is float32.

    moments    the mean of each branch and its squared deviations, of each run of tiles (Chan et al., 1979, combines them)
    finish     from these the statistics of each branch, as `function` lays them out
    apply      normalize + sum + activation: every branch is read once, the sum is written
    reduce     the sums that gradients of weights and inputs need, of each run of tiles
    spread     the gradients of all branches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
PROGRAMS = 1024  # of a pass, about: some for each multiprocessor of a large GPU
TILE = 1024  # values of a tile, at most
RUNS = 64  # of which statistics are combined at once


@triton.jit
def _place(
    tile, tiles, pixels, channels, picture_step, channel_step, pixel_step, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Where the values of a tile are, `(BLOCK_P, BLOCK_C)`, and which of them there are."""
    p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (tile // tiles) * picture_step + p[:, None] * pixel_step + c[None, :] * channel_step
    return at, (p < pixels)[:, None] & (c < channels)[None, :]


@triton.jit
def _row(statistics, index, channels, c):
    """One of the rows of `(rows, channels)`, for all pixels of a tile."""
    return tl.load(statistics + index * channels + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def _summed(xs, at, inside, statistics, channels, c, B: tl.constexpr):
    """What the activation is given: the sum of the normalized branches."""
    total = tl.zeros(at.shape, tl.float32) + _row(statistics, 4 * B, channels, c)
    for b in tl.static_range(B):
        x = tl.load(xs[b] + at, mask=inside, other=0.0).to(tl.float32)
        total += (x - _row(statistics, 4 * b, channels, c)) * _row(statistics, 4 * b + 3, channels, c)
    return total


@triton.jit
def _gradient(grad, xs, at, inside, statistics, channels, c, B: tl.constexpr, ACTIVATION: tl.constexpr):
    """The gradient of the sum of the normalized branches."""
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == RELU:
        g = tl.where(_summed(xs, at, inside, statistics, channels, c, B) <= 0, 0.0, g)
    if ACTIVATION == SILU:
        total = _summed(xs, at, inside, statistics, channels, c, B)
        gate = tl.sigmoid(total)
        g = g * gate * (1 + total * (1 - gate))
    return g


@triton.jit
def moments(
    xs, partial, pictures, tiles, pixels, channels, picture_step, channel_step, pixel_step, run,
    B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial: `(B, 2, runs, channels)`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    runs = tl.num_programs(1)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, pictures * tiles)
    for b in tl.static_range(B):
        mean = tl.zeros([BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_C], tl.float32)
        count = first * 0.0
        for tile in range(first, last):
            at, inside = _place(tile, tiles, pixels, channels, picture_step, channel_step, pixel_step, BLOCK_C, BLOCK_P)
            x = tl.load(xs[b] + at, mask=inside, other=0.0).to(tl.float32)
            here = tl.minimum(pixels - (tile % tiles) * BLOCK_P, BLOCK_P).to(tl.float32)
            middle = tl.sum(x, 0) / here
            deviation = tl.where(inside, x - middle[None, :], 0.0)
            away = middle - mean
            share = here / (count + here)
            mean += away * share
            squares += tl.sum(deviation * deviation, 0) + away * away * (count * share)
            count += here
        row = partial + (b * 2 * runs + tl.program_id(1)) * channels + c
        tl.store(row, mean, mask=c < channels)
        tl.store(row + runs * channels, squares, mask=c < channels)


@triton.jit
def finish(
    partial, weights, biases, statistics, pictures, tiles, pixels, channels, run, runs, eps,
    B: tl.constexpr, RUNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """statistics: `(4 B + 1, channels)`, as `function.Passes` has them."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros([BLOCK_C], tl.float32)
    for b in tl.static_range(B):
        mean = tl.zeros([BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_C], tl.float32)
        count = eps * 0.0
        for start in range(0, runs, RUNS):
            index = start + tl.arange(0, RUNS)
            first = tl.minimum(index * run, pictures * tiles)
            last = tl.minimum(first + run, pictures * tiles)
            # whole pictures, and the pixels of what is left of one
            values = (last // tiles) * pixels + tl.minimum((last % tiles) * BLOCK_P, pixels)
            values -= (first // tiles) * pixels + tl.minimum((first % tiles) * BLOCK_P, pixels)
            weight = values.to(tl.float32)[:, None]
            part = partial + (b * 2 * runs + index)[:, None] * channels + c[None, :]
            there = (index < runs)[:, None] & (c < channels)[None, :]
            means = tl.load(part, mask=there, other=0.0)
            here = tl.sum(weight)
            middle = tl.sum(means * weight, 0) / here
            away = middle - mean
            spreads = tl.load(part + runs * channels, mask=there, other=0.0)
            spreads += (means - middle[None, :]) * (means - middle[None, :]) * weight
            share = here / (count + here)
            mean += away * share
            squares += tl.sum(spreads, 0) + away * away * (count * share)
            count += here
        variance = squares / count
        inverse = 1.0 / tl.sqrt(variance + eps)
        row = statistics + 4 * b * channels + c
        tl.store(row, mean, mask=c < channels)
        tl.store(row + channels, variance, mask=c < channels)
        tl.store(row + 2 * channels, inverse, mask=c < channels)
        tl.store(row + 3 * channels, inverse * tl.load(weights[b] + c, mask=c < channels, other=0.0), mask=c < channels)
        shift += tl.load(biases[b] + c, mask=c < channels, other=0.0)
    tl.store(statistics + 4 * B * channels + c, shift, mask=c < channels)


@triton.jit
def apply(
    xs, y, statistics, pictures, tiles, pixels, channels, picture_step, channel_step, pixel_step, run,
    B: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * run
    for tile in range(first, tl.minimum(first + run, pictures * tiles)):
        at, inside = _place(tile, tiles, pixels, channels, picture_step, channel_step, pixel_step, BLOCK_C, BLOCK_P)
        total = _summed(xs, at, inside, statistics, channels, c, B)
        if ACTIVATION == RELU:
            total = tl.where(total <= 0, 0.0, total)  # and what is not a number stays so
        if ACTIVATION == SILU:
            total = total * tl.sigmoid(total)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def reduce(
    grad, xs, statistics, partial, pictures, tiles, pixels, channels, picture_step, channel_step, pixel_step, run,
    B: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial: `(B + 1, runs, channels)`: sums of the gradient times the normalized branches, and of the gradient alone."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    runs = tl.num_programs(1)
    first = tl.program_id(1) * run
    rows = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(first, tl.minimum(first + run, pictures * tiles)):
        at, inside = _place(tile, tiles, pixels, channels, picture_step, channel_step, pixel_step, BLOCK_C, BLOCK_P)
        g = _gradient(grad, xs, at, inside, statistics, channels, c, B, ACTIVATION)
        sums += tl.where(rows == B, tl.sum(g, 0)[None, :], 0.0)
        for b in tl.static_range(B):
            x = tl.load(xs[b] + at, mask=inside, other=0.0).to(tl.float32)
            x = (x - _row(statistics, 4 * b, channels, c)) * _row(statistics, 4 * b + 2, channels, c)
            sums += tl.where(rows == b, tl.sum(g * x, 0)[None, :], 0.0)
    row = partial + (rows * runs + tl.program_id(1)) * channels + c[None, :]
    tl.store(row, sums, mask=(rows <= B) & (c < channels)[None, :])


@triton.jit
def spread(
    grad, xs, statistics, sums, grads, pictures, tiles, pixels, channels, picture_step, channel_step, pixel_step, run,
    B: tl.constexpr, WANTED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sums: `(B + 1, channels)`; grads: the gradients of the branches of which bits are set in WANTED."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = (pictures * pixels).to(tl.float32)
    first = tl.program_id(1) * run
    for tile in range(first, tl.minimum(first + run, pictures * tiles)):
        at, inside = _place(tile, tiles, pixels, channels, picture_step, channel_step, pixel_step, BLOCK_C, BLOCK_P)
        g = _gradient(grad, xs, at, inside, statistics, channels, c, B, ACTIVATION)
        g -= _row(sums, B, channels, c) / count
        for b in tl.static_range(B):
            if (WANTED >> b) & 1:
                x = tl.load(xs[b] + at, mask=inside, other=0.0).to(tl.float32)
                x = (x - _row(statistics, 4 * b, channels, c)) * _row(statistics, 4 * b + 2, channels, c)
                d = (g - x * _row(sums, b, channels, c) / count) * _row(statistics, 4 * b + 3, channels, c)
                tl.store(grads[b] + at, d.to(grads[b].dtype.element_ty), mask=inside)


# ---- what `function.JointNorm` calls ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """How tensors of one shape and layout are cut into tiles and runs."""

    grid: tuple[int, int]
    sizes: tuple[int, ...]  # pictures, tiles of one, pixels, channels
    steps: tuple[int, ...]  # from picture to picture, channel to channel, pixel to pixel
    run: int  # tiles
    blocks: dict[str, int]

    @staticmethod
    def of(x: Tensor) -> _Cut:
        n, c, h, w = x.shape
        pixels = h * w
        if x.is_contiguous():
            block_c, steps = 1, (c * pixels, pixels, 1)
        else:
            block_c, steps = min(32, triton.next_power_of_2(c)), (c * pixels, 1, c)
        block_p = min(TILE // block_c, triton.next_power_of_2(pixels))
        tiles = triton.cdiv(pixels, block_p)
        columns = triton.cdiv(c, block_c)
        run = triton.cdiv(n * tiles, max(1, PROGRAMS // columns))
        grid = (columns, triton.cdiv(n * tiles, run))
        return _Cut(grid, (n, tiles, pixels, c), steps, run, {"BLOCK_C": block_c, "BLOCK_P": block_p})


def forward(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float, activation: int
) -> tuple[Tensor, Tensor]:
    """As `function.Passes`; on the device of the tensors."""
    cut, count, channels = _Cut.of(xs[0]), len(xs), xs[0].shape[1]
    runs = cut.grid[1]
    partial = xs[0].new_empty((count, 2, runs, channels), dtype=torch.float32)
    found = xs[0].new_empty((4 * count + 1, channels), dtype=torch.float32)
    y = torch.empty_like(xs[0])
    given = tuple(xs)
    with torch.cuda.device_of(y):
        moments[cut.grid](given, partial, *cut.sizes, *cut.steps, cut.run, count, **cut.blocks)
        finish[cut.grid[:1]](
            partial, tuple(weights), tuple(biases), found, *cut.sizes, cut.run, runs, eps, count, RUNS, **cut.blocks
        )
        apply[cut.grid](given, y, found, *cut.sizes, *cut.steps, cut.run, count, activation, **cut.blocks)
    return y, found


def backward(
    grad: Tensor, xs: Sequence[Tensor], statistics: Tensor, wanted: Sequence[bool], activation: int
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """As `function.Passes`; on the device of the tensors."""
    cut, count, channels = _Cut.of(xs[0]), len(xs), xs[0].shape[1]
    given, rows = tuple(xs), triton.next_power_of_2(count + 1)
    partial = grad.new_empty((count + 1, cut.grid[1], channels), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        reduce[cut.grid](
            grad, given, statistics, partial, *cut.sizes, *cut.steps, cut.run, count, rows, activation, **cut.blocks
        )
    sums = partial.sum(1)
    grads = [torch.empty_like(x) if want else None for x, want in zip(xs, wanted)]
    if any(wanted):
        bits = sum(1 << index for index, want in enumerate(wanted) if want)
        places: tuple[Any, ...] = tuple(x if made is None else made for x, made in zip(xs, grads))
        with torch.cuda.device_of(grad):
            spread[cut.grid](
                grad, given, statistics, sums, places, *cut.sizes, *cut.steps, cut.run, count, bits, activation, **cut.blocks
            )
    return grads, sums[:count], sums[count]

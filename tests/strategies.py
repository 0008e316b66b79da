"""Hypothesis strategies that the tests of the core share: maps, layers, normalizations and pictures, all in float64.

Structure is drawn, so that a failing case shrinks; the numbers come from a drawn seed.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rep_backbones.affine import AffineConv, Pair
from rep_backbones.containers import PaddedBatchNorm2d

ATOL = 1e-10

SEEDS = st.integers(0, 2**31 - 1)
KERNELS = st.tuples(st.integers(1, 5), st.integers(1, 5))  # even ones, 1xK and Kx1 among them
STRIDES = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDINGS = st.tuples(st.integers(0, 3), st.integers(0, 3))
DILATIONS = st.tuples(st.integers(1, 3), st.integers(1, 3))
GROUPS = st.sampled_from([1, 2, 3])
ONE: st.SearchStrategy[Pair] = st.just((1, 1))
NONE: st.SearchStrategy[Pair] = st.just((0, 0))


def laws(examples: int = 40) -> settings:
    """The same cases on every run, without a clock."""
    quiet = [HealthCheck.too_slow]
    return settings(deadline=None, derandomize=True, max_examples=examples, database=None, suppress_health_check=quiet)


def numbers(seed: int, *shape: int) -> Tensor:
    """Normal random numbers in float64, the same ones for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor, atol: float = ATOL) -> None:
    """Asserts equal shape, dtype and values."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@st.composite
def maps(
    draw: st.DrawFn,
    c1: int | None = None,
    c2: int | None = None,
    kernel: st.SearchStrategy[Pair] = KERNELS,
    stride: st.SearchStrategy[Pair] = STRIDES,
    padding: st.SearchStrategy[Pair] = PADDINGS,
    dilation: st.SearchStrategy[Pair] = DILATIONS,
    groups: st.SearchStrategy[int] = GROUPS,
    bias: st.SearchStrategy[bool] | None = None,
) -> AffineConv:
    """A map; `c1` and `c2`, where given, must be multiples of the groups."""
    g, seed = draw(groups), draw(SEEDS)
    c1 = c1 or g * draw(st.integers(1, 2))
    c2 = c2 or g * draw(st.integers(1, 2))
    constant = numbers(seed + 1, c2) if draw(st.booleans() if bias is None else bias) else None
    weight = numbers(seed, c2, c1 // g, *draw(kernel))
    return AffineConv(weight, constant, draw(stride), draw(padding), draw(dilation), g)


@st.composite
def pictures(draw: st.DrawFn, channels: int, least: Pair = (1, 1), batch: int = 2) -> Tensor:
    """`(batch, channels, h, w)` of any size from `least` up, odd and not square too."""
    h, w = (size + draw(st.integers(0, 7)) for size in least)
    return numbers(draw(SEEDS), batch, channels, h, w)


def smallest(value: AffineConv) -> Pair:
    """The smallest picture that a map gives an output for."""
    (eh, ew), (ph, pw) = value.extent, value.padding
    return max(1, eh - 2 * ph), max(1, ew - 2 * pw)


@st.composite
def norms(draw: st.DrawFn, channels: int, padding: Pair | None = None, **options: Any) -> nn.Module:
    """BN in eval: gamma of both signs and near 0, tiny and large variances, any mean, eps other than the default.

    With `padding` it is a PaddedBatchNorm2d.
    """
    eps = draw(st.sampled_from([1e-5, 1e-3, 1e-7]))
    made: Any = nn.BatchNorm2d(channels, eps, **options) if padding is None else PaddedBatchNorm2d(channels, padding, eps)
    made = made.double().eval()
    norm = made if padding is None else made.bn
    if norm.running_mean is None or norm.running_var is None:
        return made
    seed = draw(SEEDS)
    scales = torch.tensor(draw(st.lists(st.sampled_from([1e-6, 0.3, 4.0]), min_size=channels, max_size=channels)))
    gammas = torch.tensor(draw(st.lists(st.sampled_from([-2.0, 1e-9, 0.7]), min_size=channels, max_size=channels)))
    with torch.no_grad():
        norm.running_mean.copy_(numbers(seed, channels))
        norm.running_var.copy_(scales.double())
        if norm.affine:
            norm.weight.copy_(gammas.double())
            norm.bias.copy_(numbers(seed + 1, channels))
    return made

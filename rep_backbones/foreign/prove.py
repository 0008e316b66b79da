"""Proving: a candidate against the original, in float64, on inputs that a wrong kernel can't hide behind.

Measuring looks at impulses; this looks at everything else: sizes around the smallest one and every phase of the stride, so
that all borders are seen, several pictures at once, loud and quiet ones, ones with an offset, and what the model gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rep_backbones.affine import AffineConv
from rep_backbones.foreign.measure import Map

TOLERANCE = 1e-10  # of each channel's largest value: rounding in float64 does about 1e-15
QUIET = 1e-3  # of the loudest channel: what a channel is judged by at least, as rounding within may be that of a loud one
AMPLITUDES = (1.0, 1e-3, 1e3, 1e6)


class Unproved(ValueError):
    """A candidate does not compute what the original does: where it differs."""


def proved(original: Map, candidate: Map, inputs: Iterable[Tensor], tolerance: float = TOLERANCE) -> float:
    """The largest difference over all inputs, as a fraction of the channel's largest value.

    Args:
        original, candidate: maps of pictures `(n, c, h, w)`, both in float64.
        inputs: pictures; those on which the original fails are passed over.

    Raises:
        Unproved: another shape, a difference over the tolerance, or an original that fails everywhere, or that writes into
            its input.
    """
    worst, compared = 0.0, 0
    for x in inputs:
        size = f"a picture of {x.shape[2]}x{x.shape[3]}"
        kept = x.clone()
        try:
            with torch.no_grad():
                expected = original(x)
        except Exception:  # too small a picture for other people's code; the candidate need not fail there
            continue
        if not torch.equal(x, kept):
            raise Unproved("it writes into its input, which other layers may read")
        try:
            with torch.no_grad():
                got = candidate(kept)
        except Exception as error:
            raise Unproved(f"on {size} the fused layer fails ({type(error).__name__})") from error
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor) or expected.shape != got.shape:
            raise Unproved(f"on {size} the fused layer gives another shape")
        if not expected.numel():
            continue
        gap = _difference(expected, got)
        if not gap <= tolerance:
            raise Unproved(f"on {size} the fused layer is off by {gap:.1e} of the largest value")
        worst, compared = max(worst, gap), compared + 1
    if compared < 2:
        raise Unproved("the layer gives no answer on small pictures and on what the model gives it")
    return worst


def _difference(expected: Tensor, got: Tensor) -> float:
    if not (expected.isfinite().all() and got.isfinite().all()):
        return float("inf")
    axes = [axis for axis in range(expected.dim()) if axis != 1]
    peak = expected.abs().amax(axes) if axes else expected.abs()
    gap = (expected - got).abs().amax(axes) if axes else (expected - got).abs()
    return float((gap / peak.maximum(QUIET * peak.max()).clamp_min(torch.finfo(torch.float64).tiny)).max())


def pictures(value: AffineConv, seed: int = 0) -> Iterator[Tensor]:
    """Random pictures around the smallest size that the map gives an answer for, each phase of its stride among them."""
    (eh, ew), (ph, pw), (sh, sw) = value.extent, value.padding, value.stride
    low = max(1, eh - 2 * ph), max(1, ew - 2 * pw)
    sizes = [(low[0] + i, low[1] + (2 * i + 1) % (sw + 2)) for i in range(max(sh, sw) + 2)]
    sizes += [(low[0] + eh + 3, low[1] + ew + 2)]
    yield from noise(value.in_channels, sizes, seed)


def noise(channels: int, sizes: Iterable[tuple[int, int]], seed: int = 0) -> Iterator[Tensor]:
    """Random pictures of the sizes, one or two at once, of various amplitudes and offsets."""
    generator = torch.Generator().manual_seed(seed)
    for n, (h, w) in enumerate(sizes):
        x = torch.randn(1 + n % 2, channels, h, w, dtype=torch.float64, generator=generator)
        shift = torch.randn(1, channels, 1, 1, dtype=torch.float64, generator=generator)
        yield AMPLITUDES[n % len(AMPLITUDES)] * (x + (n % 3) * shift)

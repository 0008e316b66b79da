"""What is asked of passes before they are used: that they compute what the reference does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rep_backbones.one_pass.function import Passes, Reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value, beside the reference

# shapes of the proof, and the activations in each: one tile of a picture, cut off; then tiles and channels in several runs.
# ReLU is left to the first, as among many values some are so near zero that rounding decides.
PROOF: tuple[tuple[tuple[int, int, int, int], tuple[int, ...]], ...] = (((3, 6, 5, 7), (1,)), ((3, 200, 48, 52), (0, 2)))


def compare(
    passes: Passes, device: torch.device, dtype: torch.dtype, counts: Sequence[int] = (3,), proof: Any = PROOF
) -> None:
    """Holds `passes` against the reference in float64, in both layouts.

    Args:
        counts: numbers of branches.
        proof: shapes of pictures and the activations with each, as PROOF.

    Raises:
        RuntimeError: they differ by more than TOLERANCE, or what is float32 whatever the dtype is by more than its own.
    """
    for count in counts:
        for shape, kinds in proof:
            for kind in kinds:
                for layout in (torch.contiguous_format, torch.channels_last):
                    _compare(passes, device, dtype, count, shape, kind, layout)


def _compare(
    passes: Passes, device: torch.device, dtype: torch.dtype, count: int, shape: Any, kind: int, layout: torch.memory_format
) -> None:
    at = torch.arange(math.prod(shape), device=device, dtype=torch.float64).view(shape)
    xs = [(torch.sin(at * (index + 1)) + index).to(dtype, memory_format=layout) for index in range(count)]
    # with something of each branch in it, so that no sum is a small difference of large ones
    grad = (0.5 + sum(torch.sin(at * (index + 1)) for index in range(count)) + torch.cos(at)).to(dtype, memory_format=layout)
    of = torch.arange(float(shape[1]), device=device)
    weights = [torch.cos(of + index) for index in range(count)]
    biases = [torch.sin(of + index) for index in range(count)]
    wanted = [index != 1 for index in range(count)]
    y, statistics = passes.forward(xs, weights, biases, 1e-5, kind)
    grads, of_weights, of_biases = passes.backward(grad, xs, statistics, wanted, kind)
    reference = Reference()
    exact, *others = ([tensor.double() for tensor in tensors] for tensors in (xs, weights, biases))
    exact_y, exact_statistics = reference.forward(exact, others[0], others[1], 1e-5, kind)
    exact_grads, exact_weights, exact_biases = reference.backward(grad.double(), exact, exact_statistics, wanted, kind)
    _assert_near("output", [y], [exact_y], TOLERANCE[dtype])
    _assert_near("gradient of an input", grads, exact_grads, TOLERANCE[dtype])
    _assert_near("row of statistics", list(statistics), list(exact_statistics), TOLERANCE[torch.float32])
    of_parameters, exact_parameters = [*of_weights, of_biases], [*exact_weights, exact_biases]
    _assert_near("gradient of a parameter", of_parameters, exact_parameters, TOLERANCE[torch.float32])


def _assert_near(what: str, found: Sequence[Tensor | None], exact: Sequence[Tensor | None], tolerance: float) -> None:
    """Each beside its own largest value."""
    for index, (ours, theirs) in enumerate(zip(found, exact)):
        if ours is None or theirs is None:
            if ours is not theirs:
                raise RuntimeError(f"{what} {index} is there with one of kernels and reference only")
            continue
        error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        if not error <= tolerance:
            raise RuntimeError(
                f"{what} {index} differs by {error:.1e} from the reference, where {tolerance:.0e} is accepted"
            )

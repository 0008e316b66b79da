"""On CUDA: normalize, sum and activation of branches in one pass, and one for all their statistics; Triton's kernels.

    REP_BACKBONES_ONE_PASS=1 rep-yolo train model=efficientrep-n.yaml data=coco8.yaml device=0

The same function as the branches with their own norms (float32: 1e-5) in fewer passes over memory; checkpoints are the same.
It is off unless the environment asks for it: how much it saves has to be measured, on the GPU that trains, by
`tools/benchmark.py train --device cuda`, which shows layers with it and without. Before a kernel computes anything on a
device it is run there beside its reference; where it fails or differs, a warning says so and the branches run as ever. So
they do on CPUs, without Triton, under torch.compile, and where a norm is not a plain one (SyncBatchNorm, frozen, hooked).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rep_backbones import recompute
from rep_backbones.one_pass.function import ACTIVATIONS, JointNorm, Passes, Reference

SWITCH = "REP_BACKBONES_ONE_PASS"
MOST = 8  # branches, each of which a program keeps at hand
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value, beside the reference


def chosen(x: Tensor) -> bool:
    """Whether branches on `x`, in train mode and with a graph, are to be computed so where they can be."""
    if not x.is_cuda or os.environ.get(SWITCH) != "1":
        return False
    # neither torch.func nor forward mode knows the function
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


@contextmanager
def switched_on() -> Iterator[None]:
    """As with SWITCH=1 in the environment."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def joint(branches: Iterable[nn.Module], x: Tensor, activation: nn.Module) -> Tensor | None:
    """`activation(sum of branches(x))`, the norms' running statistics moved on; None where the branches are of another kind.

    Args:
        branches: each a batch norm or a sequence that ends in one.
        x: `(n, c, h, w)`.
        activation: computed within if it is one of ACTIVATIONS, else after.
    """
    split = [_split(branch) for branch in branches]
    norms = [norm for _, norm in split if norm is not None]
    kind = ACTIVATIONS.get(type(activation), 0) if untouched(activation) else 0
    passes = _passes(x) if _alike(norms) and len(norms) == len(split) else None
    if passes is None:
        return None
    values = []
    for layers, _ in split:
        value = x
        for layer in layers:
            value = layer(value)
        values.append(value)
    if not _aligned(values):
        summed: Any = sum(norm(value) for norm, value in zip(norms, values))
        return activation(summed)  # type: ignore[no-any-return]
    y = _computed(passes, values, norms, kind)
    node = y.grad_fn
    if node is not None:
        ends = [(value.grad_fn, partial(_kept, node, index)) for index, value in enumerate(values)]
        recompute.release(x, ends)
    return y if kind or type(activation) is nn.Identity else activation(y)


def untouched(module: nn.Module) -> bool:
    """Whether nobody has hooked onto a module, so that its forward may be left out."""
    return not any(
        getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _kept(node: Any, index: int) -> Any:
    return node._raw_saved_tensors[index]


def _split(branch: nn.Module) -> tuple[Sequence[nn.Module], nn.BatchNorm2d | None]:
    """The layers in front of the norm that a branch ends in, and that norm; None where it ends in something else."""
    layers = list(branch) if type(branch) is nn.Sequential and untouched(branch) else [branch]
    *front, last = layers or [branch]
    if type(last) is not nn.BatchNorm2d or not untouched(last) or not last.training:
        return front, None
    if last.weight is None or last.running_mean is None or type(last.momentum) is not float:
        return front, None
    return front, last


def _alike(norms: Sequence[nn.BatchNorm2d]) -> bool:
    settings = {(norm.eps, norm.momentum, norm.num_features) for norm in norms}
    return 2 <= len(norms) <= MOST and len(settings) == 1 and all(norm.weight.dtype == torch.float32 for norm in norms)


def _aligned(values: Sequence[Tensor]) -> bool:
    """Whether one place holds the same value of each, as the kernels read them."""
    first = values[0]
    if len({(value.shape, value.stride(), value.dtype, value.device) for value in values}) > 1:
        return False
    dense = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    return dense and first.numel() // first.shape[1] > 1 and first.numel() < 2**31 and first.dtype in DTYPES


def _computed(passes: Passes, values: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d], kind: int) -> Tensor:
    parameters = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    noted = partial(_move_on, norms, values[0].numel() // values[0].shape[1])
    return JointNorm.apply(passes, noted, norms[0].eps, kind, len(norms), *values, *parameters)  # type: ignore[no-any-return]


def _move_on(norms: Sequence[nn.BatchNorm2d], size: int, statistics: Tensor) -> None:
    """The norms' running statistics, by those of a batch of `size` values per channel."""
    of = {"running_mean": statistics[:-1:4], "running_var": statistics[1:-1:4] * (size / (size - 1))}
    for name, found in of.items():
        momentum = norms[0].momentum
        assert momentum is not None  # as `_split` has seen
        torch._foreach_lerp_([norm.get_buffer(name) for norm in norms], list(found.unbind()), momentum)
    torch._foreach_add_([norm.get_buffer("num_batches_tracked") for norm in norms], 1)


def _passes(x: Tensor) -> Passes | None:
    """The kernels, once they are seen to compute what the reference does on the device of `x`; else None."""
    if torch.cuda.is_current_stream_capturing() and _proved.cache_info().currsize == 0:
        return None  # nothing can be looked at while a graph is recorded
    return _proved(x.device)


@cache
def _proved(device: torch.device) -> Passes | None:
    try:
        from rep_backbones.one_pass import kernels

        for dtype in DTYPES:
            if dtype is not torch.bfloat16 or torch.cuda.is_bf16_supported():
                compare(kernels, device, dtype)
    except Exception as error:  # no Triton, no compiler for it, a GPU that it does not know, or a wrong result
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{SWITCH}=1 is without effect on {device}, branches are trained as ever: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels


def compare(passes: Passes, device: torch.device, dtype: torch.dtype, counts: Sequence[int] = (2, 3, 5)) -> None:
    """Holds `passes` against the reference in float64, on pictures with borders in both layouts.

    Raises:
        RuntimeError: they differ by more than TOLERANCE.
    """
    reference = Reference()
    for count in counts:
        for kind in ACTIVATIONS.values():
            for layout in (torch.contiguous_format, torch.channels_last):
                at = torch.arange(3.0 * 6 * 5 * 7, device=device).view(3, 6, 5, 7)
                xs = [(torch.sin(at * (index + 1)) + index).to(dtype, memory_format=layout) for index in range(count)]
                grad = torch.cos(at * 3).to(dtype, memory_format=layout)
                of = torch.arange(6.0, device=device)
                weights = [torch.cos(of + index) for index in range(count)]
                biases = [torch.sin(of + index) for index in range(count)]
                y, statistics = passes.forward(xs, weights, biases, 1e-5, kind)
                exact, *others = ([tensor.double() for tensor in tensors] for tensors in (xs, weights, biases))
                wanted_y, wanted_statistics = reference.forward(exact, others[0], others[1], 1e-5, kind)
                needed = [index != 1 for index in range(count)]
                grads, *found = passes.backward(grad, xs, statistics, needed, kind)
                wanted_grads, *wanted = reference.backward(grad.double(), exact, wanted_statistics, needed, kind)
                _assert_near([y, statistics, *grads, *found], [wanted_y, wanted_statistics, *wanted_grads, *wanted], dtype)


def _assert_near(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    for index, (ours, theirs) in enumerate(zip(found, wanted)):
        if ours is None or theirs is None:
            if ours is not theirs:
                raise RuntimeError(f"output {index} is there with one of kernels and reference only")
            continue
        error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"the kernels' output {index} differs by {error:.1e} from the reference in {dtype}")

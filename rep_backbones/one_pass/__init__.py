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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rep_backbones import recompute
from rep_backbones.one_pass.function import ACTIVATIONS, JointNorm, Passes
from rep_backbones.one_pass.proof import DTYPES, compare

SWITCH = "REP_BACKBONES_ONE_PASS"
MOST = 8  # branches, each of which a program keeps at hand


def chosen(x: Tensor) -> bool:
    """Whether branches on `x`, in train mode and with a graph, are to be computed so where they can be."""
    if not x.is_cuda or os.environ.get(SWITCH) != "1":
        return False
    if torch.nn.modules.module._has_any_global_hook():  # which wants to see every module
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
    if len(norms) != len(split) or not _alike(norms):
        return None
    values = []
    for layers, _ in split:
        value = x
        for layer in layers:
            value = layer(value)
        values.append(value)
    passes = _passes(values[0]) if _aligned(values, norms[0].num_features) else None
    if passes is None:
        return activation(recompute.added(x, (norm(value) for norm, value in zip(norms, values))))  # type: ignore[no-any-return]
    kind = ACTIVATIONS.get(type(activation), 0) if untouched(activation) else 0
    y = _computed(passes, values, norms, kind)
    if y.grad_fn is not None:
        recompute.release(x, [(value.grad_fn, partial(_kept, y.grad_fn, index)) for index, value in enumerate(values)])
    return y if kind else activation(y)  # type: ignore[no-any-return]


def untouched(module: nn.Module) -> bool:
    """Whether a module's forward is its class's and nobody has hooked onto it, so that it may be left out."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name) for name in hooks) and "forward" not in vars(module)


def _kept(node: Any, index: int) -> Any:
    return node._raw_saved_tensors[index]


def _split(branch: nn.Module) -> tuple[Sequence[nn.Module], nn.BatchNorm2d | None]:
    """The layers in front of the norm that a branch ends in, and that norm; None where it ends in something else."""
    layers = list(branch) if type(branch) is nn.Sequential and untouched(branch) else [branch]
    *front, last = layers or [branch]
    if type(last) is not nn.BatchNorm2d or not untouched(last) or not last.training:
        return front, None
    if last.weight is None or last.bias is None or last.running_mean is None or type(last.momentum) is not float:
        return front, None
    return front, last


def _alike(norms: Sequence[nn.BatchNorm2d]) -> bool:
    settings = {(norm.eps, norm.momentum, norm.num_features, norm.weight.dtype) for norm in norms}
    known = len(settings) == 1 and norms[0].weight.dtype == torch.float32
    return known and 2 <= len(norms) <= MOST and len(set(norms)) == len(norms)  # one in two places has two batches to note


def _aligned(values: Sequence[Tensor], channels: int) -> bool:
    """Whether one place holds the same value of each, as the kernels read them."""
    first = values[0]
    if len({(value.shape, value.stride(), value.dtype, value.device) for value in values}) > 1:
        return False
    if first.dim() != 4 or first.shape[1] != channels or first.dtype not in DTYPES:
        return False
    dense = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    return dense and channels < first.numel() < 2**31  # of one value in a channel there are no statistics


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


_PROVED: dict[tuple[torch.device, torch.dtype], Passes | None] = {}


def _passes(x: Tensor) -> Passes | None:
    """The kernels, once they are seen to compute what the reference does, on the device of `x` and in its dtype; or None."""
    key = (x.device, x.dtype)
    if key not in _PROVED:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing can be looked at while a graph is recorded
        _PROVED[key] = _proved(*key)
    return _PROVED[key]


def _proved(device: torch.device, dtype: torch.dtype) -> Passes | None:
    try:
        from rep_backbones.one_pass import kernels

        compare(kernels, device, dtype)
    except Exception as error:  # no Triton, no compiler for it, a GPU that it does not know, or a wrong result
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{SWITCH}=1 is without effect on {device} in {dtype}, branches are trained as ever: "
            f"{type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels

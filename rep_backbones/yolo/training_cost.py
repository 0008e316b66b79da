"""What branches cost in training: a layer against its plain twin, the layer of the same deployed form, in turn.

Forward and backward alone, or the whole step where an optimizer is given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rep_backbones.export.latency import rounds
from rep_backbones.fuse import fuse


def plain_twin(layer: nn.Module) -> nn.Module:
    """The plain layer or network of the same deployed form: each convolution that fusing made has a norm; in train mode.

    `layer` itself is in train mode afterwards too.
    """
    layer.train()
    twin = copy.deepcopy(layer).eval()
    kept = set(twin.modules())
    return _with_norms(fuse(twin, inplace=True), kept).train().requires_grad_(True)


def _with_norms(module: nn.Module, kept: set[nn.Module]) -> nn.Module:
    if isinstance(module, nn.Conv2d) and module not in kept:
        module.bias = None
        return nn.Sequential(module, nn.BatchNorm2d(module.out_channels))
    for name, child in list(module.named_children()):
        module._modules[name] = _with_norms(child, kept)
    return module


@dataclass(frozen=True)
class Cost:
    """Training steps of a layer.

    Attributes:
        seconds: of each step.
        saved: bytes of activations kept for the backward.
        peak: bytes that the device's allocator held at most in a step, beyond what it held before; None on the CPU.
    """

    seconds: list[float]
    saved: int
    peak: int | None = None

    def times(self, twin: Cost) -> list[float]:
        """Each step as a multiple of the twin's in the same round, which a slow moment of the machine meets alike."""
        return [own / other for own, other in zip(self.seconds, twin.seconds)]

    def memory(self, twin: Cost) -> float:
        """The peak, or on the CPU the activations, as a multiple of the twin's."""
        if self.peak is not None and twin.peak is not None:
            return self.peak / twin.peak
        return self.saved / twin.saved


def step_costs(
    layers: Mapping[str, nn.Module],
    x: Tensor,
    repeats: int = 15,
    warmup: int = 3,
    seconds: float = math.inf,
    each: Callable[[], object] = lambda: None,
    optimizers: Mapping[str, Optimizer] | None = None,
) -> dict[str, Cost]:
    """Forward and backward of each layer, in turn, so that a slow moment of the machine meets all of them.

    Args:
        layers: in train mode, on the device of `x`, `(n, c, h, w)`; each gives a feature map, whose mean square is the loss,
            or a loss, `()`.
        x: the input, whose gradient is computed too if it requires one.
        repeats, warmup, seconds, each: as `runs`, `warmup`, `seconds` and `each` of `latency.rounds`.
        optimizers: by the layers' names; their step counts too.
    """
    saved = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    peaks = {name: peak_bytes(layer, x) for name, layer in layers.items()}
    steps = {name: partial(_step, layer, x, (optimizers or {}).get(name)) for name, layer in layers.items()}
    taken = rounds(steps, runs=repeats, warmup=warmup, seconds=seconds, each=each)
    return {name: Cost([ms / 1e3 for ms in taken[name]], saved[name], peaks[name]) for name in layers}


def _step(layer: nn.Module, x: Tensor, optimizer: Optimizer | None = None) -> None:
    layer.zero_grad(set_to_none=True)
    out = layer(_fresh(x))
    (out.square().mean() if out.dim() else out).backward()
    if optimizer is not None:
        optimizer.step()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _fresh(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def peak_bytes(layer: nn.Module, x: Tensor) -> int | None:
    """The most that PyTorch's CUDA allocator holds during a step beyond what it held before; None on the CPU."""
    if not x.is_cuda:
        return None
    _step(layer, x)  # workspaces are allocated once
    layer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    _step(layer, x)
    found = torch.cuda.max_memory_allocated(x.device) - before
    layer.zero_grad(set_to_none=True)
    return found


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of what a forward keeps for the backward, without parameters and buffers; storages count once.

    It is what is still there when the forward is over and only its graph is held, whoever holds it and however.
    """
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    given = _fresh(x)
    with _Storages() as made:
        graph = layer(given.clone()).grad_fn
    found = sum(size for address, size in made.alive().items() if address not in own)
    del graph
    return found


class _Storages(TorchDispatchMode):
    """Notes the storages that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        return out

    def alive(self) -> dict[int, int]:
        """Address and bytes of those that someone holds."""
        return {address: size for held, address, size in self._seen.values() if not held.expired()}

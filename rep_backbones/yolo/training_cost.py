"""What branches cost in training: a layer against its plain twin, the layer of the same deployed form, in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.containers import Gate
from rep_backbones.fuse import fuse


def plain_twin(layer: nn.Module) -> nn.Module:
    """The plain layer of the same deployed form: each convolution of the fused one with a norm behind it, in train mode."""
    fused = fuse(layer.eval(), foreign="keep")
    layer.train()
    gates = [module for module in fused.modules() if isinstance(module, Gate)]
    inside = {module for gate in gates for module in gate.modules()}
    return _with_norms(fused, inside).train().requires_grad_(True)


def _with_norms(module: nn.Module, kept: set[nn.Module]) -> nn.Module:
    if isinstance(module, nn.Conv2d) and module not in kept:
        module.bias = None
        return nn.Sequential(module, nn.BatchNorm2d(module.out_channels))
    for name, child in list(module.named_children()):
        module._modules[name] = _with_norms(child, kept)
    return module


@dataclass(frozen=True)
class Cost:
    """One training step of a layer: seconds of each run, and bytes of activations kept for the backward."""

    seconds: list[float]
    saved: int


def step_costs(layers: Mapping[str, nn.Module], x: Tensor, repeats: int = 15, warmup: int = 3) -> dict[str, Cost]:
    """Forward and backward of each layer, in turn, so that a slow moment of the machine meets all of them.

    Args:
        layers: in train mode, on the device of `x`, `(n, c, h, w)`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    saved = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    for index in range(warmup + repeats):
        for name, layer in layers.items():
            taken = _step(layer, x)
            if index >= warmup:
                seconds[name].append(taken)
    return {name: Cost(seconds[name], saved[name]) for name in layers}


def _step(layer: nn.Module, x: Tensor) -> float:
    layer.zero_grad(set_to_none=True)
    given = x.detach().requires_grad_()
    _finish(x)
    start = time.perf_counter()
    layer(given).square().mean().backward()
    _finish(x)
    return time.perf_counter() - start


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of what a forward keeps for the backward, without parameters and buffers; storages count once."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x.detach().requires_grad_())
    return sum(storage.nbytes() for storage in kept.values())

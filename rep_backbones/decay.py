"""Weight decay that fits layers with branches: none on norms and scales; on kernels, if wanted, that of what is deployed.

Plain L2 pulls on each branch's own kernel, of which the deployed network has none. The decay of the equivalent kernel W,
which `rules.equivalent` computes from the branches' kernels K with the running statistics of their norms, is

    penalty = weight_decay / 2 * ||W(K)||^2        so that        K.grad += weight_decay * d(||W||^2 / 2) / dK

Norms and scales are held: their gradients get nothing, as in RepVGG's custom L2 (Ding et al., "RepVGG", CVPR 2021, its
repository's `get_custom_L2`). That one leaves the identity out and weighs the kernel's centre by the norms' scales; this one
is the L2 of the kernel as it will be deployed, for every block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rep_backbones.containers import Scale
from rep_backbones.rules import FoldError, equivalent, multi_branch

# whose weight decay is a term of the gradient; AdamW's and MuSGD's is another step, which no gradient can make
OPTIMIZERS = tuple(getattr(torch.optim, name) for name in ("SGD", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop"))
SPARED = (Scale, nn.modules.batchnorm._BatchNorm)


def spare(optimizer: Optimizer, model: nn.Module) -> None:
    """Take the weight decay off norms and branch scales: those that have one move to parameter groups of their own."""
    modules = [module for module in model.modules() if isinstance(module, SPARED)]
    _set_apart(optimizer, [p for module in modules for p in module.parameters(recurse=False)], "spared")


def decay_equivalent(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Replace the weight decay on the kernels of multi-branch layers by that of their equivalent kernels.

    The kernels move to parameter groups without a decay of their own, and each step adds the gradient of the penalty first:
    behind gradient scaling, accumulation, averaging and clipping, which plain weight decay does not see either. The factor
    is read at each step from the `weight_decay` of the group that a kernel came from.

    Args:
        optimizer: of a type in OPTIMIZERS.
        model: whose multi-branch layers are found by `rules.multi_branch`; in training it stays in train mode.

    Returns:
        The hook's handle; `remove()` leaves the kernels without any decay.

    Raises:
        TypeError: for another optimizer.
        FoldError: for a layer that has no equivalent kernel, with its path.
    """
    if type(optimizer) not in OPTIMIZERS:
        raise TypeError(
            f"{type(optimizer).__name__} does not take decay=equivalent, as its weight decay is no part of the gradient; "
            f"give optimizer={' or '.join(kind.__name__ for kind in OPTIMIZERS)}, or decay=plain"
        )
    layers = {path: part for path, _, part in multi_branch(model)}
    for path, part in layers.items():
        try:
            with torch.no_grad():
                equivalent(part)
        except FoldError as error:
            raise FoldError(f"has no equivalent kernel that could decay: {error}", path) from error
    kernels = [p for part in layers.values() for p in part.parameters() if p.dim() > 1]
    origins = _set_apart(optimizer, kernels, "equivalent")
    return optimizer.register_step_pre_hook(_EquivalentDecay(list(layers.values()), origins))


def half_square(part: nn.Module) -> Tensor:
    """`||W||^2 / 2` of the equivalent kernel of an affine part, a scalar, differentiable."""
    return equivalent(part).weight.square().sum() / 2


class _EquivalentDecay:
    """The step's hook."""

    def __init__(self, parts: list[nn.Module], origins: dict[int, int]) -> None:
        self.parts = [(part, [p for p in part.parameters() if id(p) in origins]) for part in parts]
        self.origins = origins

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        for part, kernels in self.parts:  # one by one, so that one layer's equivalent kernel is held at a time
            learning = [kernel for kernel in kernels if kernel.grad is not None]
            factors = [groups[self.origins[id(kernel)]]["weight_decay"] for kernel in learning]
            if not any(factors):
                continue
            with torch.enable_grad():
                half = half_square(part)
            pulls = torch.autograd.grad(half, learning, allow_unused=True, materialize_grads=True)
            for kernel, factor, pull in zip(learning, factors, _of_first_process(pulls)):
                assert kernel.grad is not None
                kernel.grad.add_(pull, alpha=factor)


def _of_first_process(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of rank 0, in all processes that train together: their norms' statistics differ, so the pulls would."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.broadcast(flat, src=0)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors)]


def _set_apart(optimizer: Optimizer, parameters: Iterable[nn.Parameter], label: str) -> dict[int, int]:
    """Move the parameters that decay to groups without a decay, otherwise like the ones they were in.

    Returns:
        The id of each parameter that was moved -> the index of the group that it came from.
    """
    wanted = {id(parameter) for parameter in parameters}
    origins: dict[int, int] = {}
    for index, group in enumerate(list(optimizer.param_groups)):
        moved = [p for p in group["params"] if id(p) in wanted]
        if not moved or not group["weight_decay"]:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        options = {name: value for name, value in group.items() if name != "params"}
        # the label that Ultralytics finds groups by, which would give the decay back
        optimizer.add_param_group({**options, "params": moved, "weight_decay": 0.0, "param_group": label})
        origins.update((id(parameter), index) for parameter in moved)
    return origins

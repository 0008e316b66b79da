"""RepSGD and RepAdamW: the steps of a plain network in the gradient form, as its branches would make them.

With a layer's masks (see `gradient_form`), its kernel W, gradient G and the decay factor wd:

    RepSGD     W <- W - lr * momentum_of(squares * G + wd * (W - fixed))
    RepAdamW   W <- W - lr * wd * (W - fixed) - lr * sizes * m / (sqrt(v) + eps)    m, v of G, with AdamW's corrections

RepSGD is what SGD makes of W where it trains the constant-scale branches, exactly: momentum, Nesterov's and damped, and the
decay are linear, and the branches' own decay, summed with their scales, is that of W. RepAdamW is what AdamW makes of W, but
for eps: a branch of scale s has `eps / |s|` there, which matters where `sqrt(v)` is not far above eps. AdamW divides the
gradient by its own size, so that masks on the gradient alone would change nothing.

Norms of gradients are those of the plain network: clipping, which stands before the step, sees G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from rep_backbones.gradient_form import Masks, masked


def _layers(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[nn.Conv2d]:
    name = type(optimizer).__name__
    found = [conv for _, conv, _ in masked(model)]
    if not found:
        raise ValueError(
            f"{name}: the model has no layer in the gradient form, so it would be {type(optimizer).__base__.__name__}; "  # type: ignore[union-attr]
            "give model=to_gradient(model), and its parameters"
        )
    return found


class RepSGD(SGD):
    """`torch.optim.SGD`, and the kernels of `model`'s layers in the gradient form learn as their branches would.

    Args:
        params: parameters or groups, as SGD takes them.
        model: from `to_gradient`; it holds the masks.
        options: SGD's own.

    Raises:
        ValueError: `model` has no layer in the gradient form.
    """

    def __init__(self, params: Any, *, model: nn.Module, **options: Any) -> None:
        super().__init__(params, **options)
        self._model = model
        _layers(self, model)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients are left as they are."""
        loss = _evaluated(closure)
        plain: list[tuple[Tensor, Tensor]] = []
        decays = {id(p): g["weight_decay"] * (-1 if g["maximize"] else 1) for g in self.param_groups for p in g["params"]}
        for weight, masks in _learning(self, self._model):
            assert weight.grad is not None
            plain.append((weight, weight.grad))
            weight.grad = weight.grad * masks.squares
            if masks.fixed is not None:
                weight.grad.sub_(masks.fixed * decays[id(weight)])
        try:
            super().step()
        finally:
            for weight, gradient in plain:
                weight.grad = gradient
        return loss


class RepAdamW(AdamW):
    """`torch.optim.AdamW`, and the kernels of `model`'s layers in the gradient form learn as their branches would.

    Args:
        params: parameters or groups, as AdamW takes them.
        model: from `to_gradient`; it holds the masks.
        options: AdamW's own but for `fused`, which may skip a step by itself.

    Raises:
        ValueError: `model` has no layer in the gradient form, or `fused` is asked for.
    """

    def __init__(self, params: Any, *, model: nn.Module, **options: Any) -> None:
        super().__init__(params, **options)
        if any(group["fused"] for group in self.param_groups):
            raise ValueError("RepAdamW does not take fused=True; leave it out, or give foreach=True")
        self._model = model
        _layers(self, model)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = _evaluated(closure)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        decays = {id(p): float(g["lr"]) * g["weight_decay"] for g in self.param_groups for p in g["params"]}
        for weight, masks in _learning(self, self._model):
            decayed = weight * (1 - decays[id(weight)])
            if masks.fixed is not None:
                decayed.add_(masks.fixed * decays[id(weight)])
            kept.append((weight, decayed, masks.sizes))
            weight.zero_()  # what stands there after the step is the step alone, without rounding
        super().step()
        for weight, decayed, sizes in kept:
            weight.mul_(sizes).add_(decayed)
        return loss


def _learning(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[Tensor, Masks]]:
    """The kernels with masks that this step changes."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for _, conv, masks in masked(model):
        if id(conv.weight) in own:
            yield conv.weight, masks


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


OPTIMIZERS = (RepSGD, RepAdamW)

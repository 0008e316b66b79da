"""The sum of batch norms and its activation as one function of autograd, `JointNorm`, and a reference of its passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.SiLU: 2}  # as the kernels number them
_FUNCTIONS = (lambda x: x, torch.relu, F.silu)


class Passes(Protocol):
    """Who computes: `Reference`, or the module `kernels`."""

    def forward(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float, activation: int
    ) -> tuple[Tensor, Tensor]:
        """Normalize, sum, activate.

        Args:
            xs: the norms' inputs, `(n, c, h, w)`, of one dtype and layout.
            weights, biases: of the norms, `(c,)`.

        Returns:
            The output, `(n, c, h, w)`, and the statistics, `(4 b + 1, c)`: for each of the b branches its mean, biased
            variance, `1 / sqrt(variance + eps)` and that times its weight; and last the sum of the biases.
        """

    def backward(
        self, grad: Tensor, xs: Sequence[Tensor], statistics: Tensor, wanted: Sequence[bool], activation: int
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """The gradients of those xs that are wanted, of the weights, `(b, c)`, and of each bias, `(c,)`."""


class Reference:
    """The passes in PyTorch's operators, in the dtype of the weights at least; on any device."""

    def forward(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float, activation: int
    ) -> tuple[Tensor, Tensor]:
        rows = []
        for x, weight in zip(xs, weights):
            variance, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
            inverse = (variance + eps).rsqrt()
            rows += [mean, variance, inverse, inverse * weight]
        found = torch.stack([*rows, torch.stack(tuple(biases)).sum(0)])
        return _FUNCTIONS[activation](_summed(xs, found)).to(xs[0].dtype), found

    def backward(
        self, grad: Tensor, xs: Sequence[Tensor], statistics: Tensor, wanted: Sequence[bool], activation: int
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        with torch.enable_grad():
            total = _summed(xs, statistics).requires_grad_()
            (g,) = torch.autograd.grad(_FUNCTIONS[activation](total), total, grad.to(total.dtype))
        count = g.numel() // g.shape[1]
        bias = g.sum((0, 2, 3))
        grads: list[Tensor | None] = []
        weights = []
        for index, (x, want) in enumerate(zip(xs, wanted)):
            mean, _, inverse, scale = statistics[4 * index : 4 * index + 4, :, None, None]
            normalized = (x - mean) * inverse
            weights.append((g * normalized).sum((0, 2, 3)))
            middle, slope = (sums[:, None, None] / count for sums in (bias, weights[-1]))
            grads.append(((g - middle - normalized * slope) * scale).to(x.dtype) if want else None)
        return grads, torch.stack(weights), bias


def _summed(xs: Sequence[Tensor], statistics: Tensor) -> Tensor:
    total = statistics[-1, :, None, None]
    for index, x in enumerate(xs):
        total = total + (x - statistics[4 * index, :, None, None]) * statistics[4 * index + 3, :, None, None]
    return total


class JointNorm(torch.autograd.Function):
    """`activation(sum of batch_norm(x, weight, bias))` with the batches' statistics, of which `noted` is told.

    Gradients of gradients are those of PyTorch's own norms, computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, passes: Passes, noted: Callable[[Tensor], object], eps: float, activation: int, count: int, *given: Tensor
    ) -> Tensor:
        xs, weights, biases = given[:count], given[count : 2 * count], given[2 * count :]
        y, statistics = passes.forward(xs, weights, biases, eps, activation)
        noted(statistics)  # now: torch.utils.checkpoint ends a second forward when the last tensor is saved
        ctx.save_for_backward(*given, statistics)
        ctx.passes, ctx.eps, ctx.activation, ctx.count = passes, eps, activation, count
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        count, none = ctx.count, (None,) * 5
        *given, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            return (*none, *_differentiable(grad, given, wanted, ctx.eps, ctx.activation))
        xs = given[:count]
        if grad.stride() != xs[0].stride():
            grad = torch.empty_like(xs[0]).copy_(grad)
        grads, weights, bias = ctx.passes.backward(grad, xs, statistics, wanted[:count], ctx.activation)
        of_weights = weights.to(given[count].dtype).unbind()
        of_biases = bias.to(given[count].dtype).repeat(count, 1).unbind()  # none in another's place
        rest = [value if want else None for value, want in zip((*of_weights, *of_biases), wanted[count:])]
        return (*none, *grads, *rest)


def _differentiable(
    grad: Tensor, given: Sequence[Tensor], wanted: Sequence[bool], eps: float, activation: int
) -> list[Tensor | None]:
    given = [tensor.view_as(tensor) for tensor in given]  # one may be made of another, and only the sum's own paths count
    count = len(given) // 3
    total: Any = sum(
        F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        for x, weight, bias in zip(given[:count], given[count : 2 * count], given[2 * count :])
    )
    chosen = [tensor for tensor, want in zip(given, wanted) if want]
    found = iter(torch.autograd.grad(_FUNCTIONS[activation](total), chosen, grad, create_graph=True))
    return [next(found) if want else None for want in wanted]

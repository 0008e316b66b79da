"""Branches in the gradient alone: a plain network that learns as one with constant-scale branches would.

Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023, section 3.1. Of branches that are
summed, each one kernel W_i times a constant scale s_i per output channel, y = sum_i s_i conv(x; W_i), the sum's kernel is

    W = sum_i s_i E_i W_i

where E_i writes W_i into its places of W. A step of gradient descent on all W_i moves W by -lr * squares * dL/dW, and one by
the sign of the gradient, Adam's where all moments agree, by -lr * sizes * sign(dL/dW), with two constant masks:

    squares = sum_i s_i^2 E_i(1)          sizes = sum_i |s_i| E_i(1)

A branch that learns nothing (an identity without a norm) adds a fixed part to W, which no decay may take: `fixed`.

All are found by the algebra: the fold is asked how far it moves when its parameters take these steps. That it moves so
from any place and for any gradient is checked, and decides which branches allow it: kernels in series and pooling behind one
don't. `rep_optimizers` uses the masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rep_backbones.containers import Parallel, Scale, children_of
from rep_backbones.online import Online
from rep_backbones.online_form import apart, is_online, to_online, with_norm, with_parts
from rep_backbones.rules import FoldError, NeedsChannels, equivalent, in_float64, multi_branch

# buffers of a convolution, each of its weight's shape; the last only where there is such a branch
SQUARES, SIZES, FIXED = BUFFERS = ("gradient_squares", "gradient_sizes", "gradient_fixed")
_TOLERANCE = 1e-9

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Masks:
    """Constant factors of a kernel's steps, not negative, and its fixed part, each `(c2, c1 / g, kh, kw)`: see above."""

    squares: Tensor
    sizes: Tensor
    fixed: Tensor | None = None


def to_gradient(model: nn.Module, *, scales: nn.Module | None = None, inplace: bool = False) -> nn.Module:
    """A copy of the model in which each multi-branch layer is one plain convolution and one norm.

    Its kernel is that of the branches as they are; what the branches would do in training is kept as two buffers on the
    convolution (three beside a branch that learns nothing), which RepSGD and RepAdamW read. In eval mode the copy computes
    the same.

    Args:
        model: a block, any nn.Module, in train or eval mode, of any dtype and device.
        scales: the same layers in the online form, trained, whose learned scales are the constants; by default those of
            `to_online(model)`, 1 where the norms are fresh.
        inplace: change `model` itself; after an error it may be in the online form.

    Raises:
        FoldError: as `to_online`, and for branches whose steps no constant masks make.
        ValueError: `scales` has other layers.
    """
    model = to_online(model, inplace=inplace)
    if scales is not None:
        _take_scales(model, scales)
    made: list[tuple[str, nn.Module, nn.Module]] = []
    for path, layer, part in multi_branch(model):
        if is_online(part):
            try:
                made.append((path, layer, _plain(part)))
            except FoldError as error:
                raise error.below(path) from error
    return with_parts(model, made)


def masked(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, Masks]]:
    """Dotted path, convolution and masks of each layer in the gradient form."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and {SQUARES, SIZES} <= module._buffers.keys():
            yield path, module, Masks(*(module._buffers.get(name) for name in BUFFERS))  # type: ignore[arg-type]


def mask(conv: nn.Conv2d, masks: Masks) -> None:
    """Put masks on a plain convolution, in its dtype and on its device."""
    for name, value in zip(BUFFERS, (masks.squares, masks.sizes, masks.fixed)):
        if value is not None:
            conv.register_buffer(name, value.to(conv.weight))


def unmask(model: nn.Module) -> None:
    """Take the masks off, as training is over."""
    for _, conv, _ in list(masked(model)):
        for name in BUFFERS:
            conv._buffers.pop(name, None)


def masks_of(branches: nn.Module) -> Masks:
    """The masks of a sum of branches without norms, in float64 on the CPU.

    Trained is each kernel, and each scale of a branch that has no kernel (the identity's); other scales are constants.

    Raises:
        FoldError: for branches whose steps no constant masks make; it names them.
    """
    if any(p.is_meta for p in branches.parameters()):  # shapes have no numbers to ask
        kernel = equivalent(branches).weight
        return Masks(
            torch.empty_like(kernel), torch.empty_like(kernel), torch.empty_like(kernel) if _rests(branches) else None
        )
    masks = _constant(branches)
    if masks is None:
        bad = [f"{name} ({type(branch).__name__})" for name, branch in _items(branches) if not _fits(branch)]
        raise FoldError(
            f"has no gradient form: what its branches {', '.join(bad) or 'do'} learn is no constant multiple of the merged "
            "kernel's gradient, as kernels in series and pooling behind one make it; train it online, or take a block whose "
            "branches have one kernel each, such as RepVGGBlock, ACBlock or MobileOneBlock"
        )
    return masks


def _fits(branch: nn.Module) -> bool:
    try:
        return _constant(branch) is not None
    except NeedsChannels:  # an identity, which learns nothing
        return True


def _constant(branches: nn.Module) -> Masks | None:
    """The masks, or None where the fold moves otherwise from another place or for another gradient."""
    part = copy.deepcopy(branches).cpu().double()
    learned = [p.requires_grad_() for _, branch in _items(part) for p in _learned(branch)]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        kernel = equivalent(part).weight
    ones, noise = torch.ones_like(kernel), torch.empty_like(kernel).normal_(generator=draw)
    squares, sizes = _moved(part, learned, ones, _itself), _moved(part, learned, ones, torch.sign)
    fixed = None
    if _rests(branches):
        for p in learned:
            nn.init.zeros_(p)
        with torch.no_grad():
            fixed = equivalent(part).weight
    for p in learned:
        nn.init.normal_(p, generator=draw)
    same = _close(_moved(part, learned, noise, _itself), squares * noise)
    same = same and _close(_moved(part, learned, noise, torch.sign), sizes * noise.sign())
    return Masks(squares, sizes, fixed) if same else None


def _moved(part: nn.Module, learned: list[Tensor], gradient: Tensor, step: Step) -> Tensor:
    """How far the kernel moves when each parameter takes the step of its gradient."""
    if not learned:
        return torch.zeros_like(gradient)
    start = equivalent(part).weight
    steps = torch.autograd.grad(start, learned, gradient, allow_unused=True, materialize_grads=True)
    before = [p.detach().clone() for p in learned]
    with torch.no_grad():
        for p, g in zip(learned, steps):
            p.add_(step(g))
        moved = equivalent(part).weight - start
        for p, old in zip(learned, before):
            p.copy_(old)
    return moved


def _itself(gradient: Tensor) -> Tensor:
    return gradient


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= _TOLERANCE * (1 + float(b.abs().max()))


def _items(branches: nn.Module) -> list[tuple[str, nn.Module]]:
    return children_of(branches) if type(branches) is Parallel else [("", branches)]


def _rests(branches: nn.Module) -> bool:
    """Whether there is a branch that learns nothing."""
    return not all(_learned(branch) for _, branch in _items(branches))


def _learned(branch: nn.Module) -> list[Tensor]:
    scales = {p for module in branch.modules() if isinstance(module, Scale) for p in module.parameters()}
    return [p for p in branch.parameters() if p not in scales and p.dim() > 1] or list(scales)


def _plain(part: nn.Module) -> nn.Module:
    """One convolution with the masks, and the norm, for an online part."""
    body, norm = apart(part)
    assert isinstance(body, Online)
    if norm is None or norm.running_mean is None:
        raise FoldError("has no gradient form: no norm with running statistics stands behind its sum, in the layer itself")
    value, like = in_float64(body), next(body.parameters())
    norm = copy.deepcopy(norm)
    if value.bias is not None:  # the norm takes it away again
        with torch.no_grad():
            norm.running_mean -= value.bias.to(norm.running_mean)  # type: ignore[operator]
    conv = replace(value, bias=None).to_conv(like.dtype).to(like.device)
    conv.bias = None
    mask(conv, masks_of(body.branches))
    return with_norm(conv, norm).train(part.training)


def _take_scales(model: nn.Module, scales: nn.Module) -> None:
    """The learned scales of another model of the same layers, into this one."""
    given = dict(scales.named_modules())
    taken = False
    for path, module in model.named_modules():
        if not isinstance(module, Online):
            continue
        for name, scale in module.named_modules(prefix=path):
            if not isinstance(scale, Scale):
                continue
            other = given.get(name)
            if not isinstance(other, Scale) or other.alpha.shape != scale.alpha.shape:
                found = "none" if other is None else f"a {type(other).__name__}"
                raise ValueError(
                    f"scales: {name} is a scale of {scale.alpha.numel()} here, and {found} there; give a model of the same "
                    "layers in the online form: the run that looks for scales is trained with branches=online"
                )
            with torch.no_grad():
                scale.alpha.copy_(other.alpha)
            taken = True
    if not taken:
        raise ValueError("scales: this model has no layers with learned scales that they could be for")

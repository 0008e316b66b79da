"""Branches at the price of one: any multi-branch layer in the form that OREPA trains.

Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2: each norm inside the branches becomes a
learned scale per channel, one norm stands behind the sum, and the kernel K of the whole sum is folded in each forward:

    y = BN(conv(x; K)),  K = sum of the branches' kernels, each times its scales

Whether a layer allows it is decided by the fold: what folds without its norms can be trained so.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.affine import batch_norm
from rep_backbones.containers import Block, PaddedBatchNorm2d, Scale, children_of
from rep_backbones.online import Online
from rep_backbones.rules import FoldError, check_numbers, equivalent, is_series, merges, multi_branch

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # exact types


def to_online(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of the model whose multi-branch layers run as one convolution and one norm, in training too.

    In eval mode it computes the same. In train mode the one norm takes the statistics of the sum where each branch had its
    own. Layers in this form already (OREPABlock) stay as they are, and so do those of other people that are shown as ours.

    Args:
        model: a block, any nn.Module, in train or eval mode, of any dtype and device.
        inplace: change `model` itself (a lone sum of branches is returned anew); it stays whole where this is refused.

    Raises:
        FoldError: no layer with branches, NaN or inf, or branches that don't fold without their norms; with the path.
    """
    model = model if inplace else copy.deepcopy(model)
    found = multi_branch(model)
    if not found:
        raise FoldError(
            f"{type(model).__name__} has no branches that fold to one convolution, so there is nothing to train as one"
        )
    made: list[tuple[str, nn.Module, nn.Module]] = []
    for path, layer, part in found:
        if (isinstance(layer, Block) or merges(layer)) and not is_online(part):
            try:
                made.append((path, layer, _online(part)))
            except FoldError as error:
                raise error.below(f"{path}.branches" if isinstance(layer, Block) and path else path) from error
    return with_parts(model, made)


def with_parts(model: nn.Module, made: Iterable[tuple[str, nn.Module, nn.Module]]) -> nn.Module:
    """The model, changed: each layer, by path, has the affine part that was made for it; a lone part is that part."""
    for path, layer, part in made:
        if isinstance(layer, Block):
            layer.set_submodule("branches", part)
        elif path:
            model.set_submodule(path, part)
        else:
            return part
    return model


def is_online(part: nn.Module) -> bool:
    """Whether an affine part is folded in each forward and normalized nowhere inside."""
    body, _ = apart(part)
    return type(body) is Online


def apart(part: nn.Module) -> tuple[nn.Module, BatchNorm | None]:
    """An affine part without the norm at its end, and that norm where there is one."""
    children = children_of(part) if is_series(part) else []
    if len(children) < 2 or type(children[-1][1]) not in NORMS:
        return part, None
    body = children[0][1] if len(children) == 2 else nn.Sequential(OrderedDict(children[:-1]))
    return body, children[-1][1]  # type: ignore[return-value]


def with_norm(body: nn.Module, norm: nn.Module) -> nn.Sequential:
    """The two in series, under the names that all blocks with one norm behind their sum have."""
    return nn.Sequential(OrderedDict(sum=body, bn=norm))


def _online(part: nn.Module) -> nn.Module:
    """The online form of an affine part; shares nothing with it."""
    check_numbers(part)
    part = copy.deepcopy(part)
    body, norm = apart(part)
    with torch.no_grad():
        before = _bias(body)
        inner = [module for module in body.modules() if type(module) in NORMS]
        body = _scaled(body, {})
        moved = before - _bias(body)  # what the norms inside have added, which the one behind the sum takes over
        if norm is None and inner:
            norm = _neutral(inner[0], equivalent(body).out_channels)  # type: ignore[arg-type]
        if norm is not None:
            assert norm.running_mean is not None
            norm.running_mean -= moved
        whole = Online(body) if norm is None else with_norm(Online(body), norm)
    return whole.train(part.training)


def _bias(body: nn.Module) -> Tensor:
    value = equivalent(body)
    return value.weight.new_zeros(value.out_channels) if value.bias is None else value.bias


def _neutral(like: BatchNorm, channels: int) -> BatchNorm:
    """A norm that does nothing in eval mode yet: mean 0, variance 1."""
    new = nn.BatchNorm2d(channels, like.eps, like.momentum, device=like.weight.device, dtype=like.weight.dtype)
    nn.init.constant_(new.weight, (1 + like.eps) ** 0.5)
    if isinstance(like, nn.SyncBatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(new, like.process_group)
    return new


# ---- norms become scales -------------------------------------------------------------------------------------------------


def _scale(norm: BatchNorm) -> Scale:
    factor = batch_norm(norm).weight.detach().reshape(-1)
    scale = Scale(norm.num_features, per_channel=True).to(factor)
    scale.alpha.copy_(factor)
    return scale


def _scale_and_pad(norm: PaddedBatchNorm2d) -> nn.Module:
    (ph, pw), scale = norm.padding, _scale(norm.bn)
    return nn.Sequential(OrderedDict(scale=scale, pad=nn.ZeroPad2d((pw, pw, ph, ph)))) if ph or pw else scale


# exact type of a norm -> what stands for it in a branch that has none
SCALES: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: _scale,
    nn.SyncBatchNorm: _scale,
    PaddedBatchNorm2d: _scale_and_pad,
}


def _scaled(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with scales for norms, in place; `done` knows what stood in another place too."""
    if module not in done:
        make = SCALES.get(type(module))
        done[module] = module if make is None else make(module)
        for name, child in () if make else children_of(module):
            module._modules[name] = _scaled(child, done)
    return done[module]

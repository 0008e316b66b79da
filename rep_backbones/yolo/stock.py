"""A fused model in stock classes only, so that a deploy checkpoint loads where this package is not installed.

A merged layer is plain torch. What is left of this package are containers without arithmetic of their own, and Ultralytics
has a module that computes
each: its parts are put in an empty shell of that class. Ultralytics' restricted loading knows these classes too.

    Residual     RepC3             cv3(m(cv1(x)) + cv2(x))
    Concat       C3                cv3(cat(m(cv1(x)), cv2(x)))
    Split        C2                cv2(cat(m(a), b)), a and b the halves of cv1(x)
    PoolPyramid  SPPF              cv2(cat(y, m(y), m(m(y)), m(m(m(y))))), y = cv1(x)
    Gate         ChannelAttention  x * act(fc(pool(x)))
    Scale        nn.BatchNorm2d    mean 0, variance 1, eps 0, weight alpha
    Stages       TorchVision       with split: a list of x and the output of each of m, one after the other
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import C2, C3, SPPF, ChannelAttention, Conv, DWConv, RepC3, TorchVision

from rep_backbones.backbones import Stages
from rep_backbones.containers import Block, Concat, Gate, PoolPyramid, Residual, Scale, Split
from rep_backbones.fuse import fuse

_PACKAGE = "rep_backbones"


def to_stock(model: nn.Module) -> nn.Module:
    """A copy of a fused model, computing the same, whose module classes are those of torch and Ultralytics (and of the
    user's own layers).

    Raises:
        ValueError: a module of this package has no stock form, with its path; that is a multi-branch layer where the model
            was not fused.
    """
    model = _stock(deepcopy(model))
    left = [f"{path} ({type(module).__name__})" for path, module in model.named_modules() if _is_ours(module)]
    if left:
        raise ValueError(
            f"no stock form for {', '.join(left[:5])}{' ...' * (len(left) > 5)}: "
            "fuse the model first, with rep_backbones.fuse(model)"
        )
    for module in model.modules():
        if str(vars(module).get("type", "")).startswith(_PACKAGE):
            module.type = str(type(module))[8:-2]  # type: ignore[assignment]  # the name that it is printed by
    return model


def merge_stock_norms(model: nn.Module) -> None:
    """In place, each stock Conv of a fused model as `Sequential(conv=..., act=...)`, its norm merged as the stock fuse does.

    The names in its state are those after the stock fuse, which would leave a bound method that restricted loading refuses.
    """
    for name, child in [*model.named_children()]:
        if type(child) in (Conv, DWConv):
            norm = child._modules.get("bn")
            conv = fuse(nn.Sequential(child.conv, norm).eval())[0] if type(norm) is nn.BatchNorm2d else child.conv  # type: ignore
            model._modules[name] = _placed(nn.Sequential(OrderedDict(conv=conv, act=child.act)), child)  # type: ignore
        else:
            merge_stock_norms(child)


def _stock(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        new = _stock(child)
        if new is not child:
            module._modules[name] = new
    if not _is_ours(module):
        return module
    make = STOCK.get(type(module)) or SERIES.get(type(module).forward)
    return _placed(make(module), module) if make else module


def _residual(module: Any) -> nn.Module:
    return _shell(RepC3, cv1=nn.Identity(), m=module.body, cv2=module.shortcut, cv3=nn.Identity())


def _concat(module: Any) -> nn.Module:
    first, *others = module.parts
    for part in others:
        first = _shell(C3, cv1=nn.Identity(), m=first, cv2=part, cv3=nn.Identity())
    return first


def _split(module: Any) -> nn.Module:
    return _shell(C2, cv1=nn.Identity(), m=module.body, cv2=nn.Identity())


def _pool_pyramid(module: Any) -> nn.Module:
    shell = _shell(SPPF, cv1=nn.Identity(), cv2=nn.Identity(), m=module.pool)
    shell.n, shell.add = 3, False  # type: ignore[assignment]  # read by newer versions only
    return shell


def _gate(module: Any) -> nn.Module:
    return _shell(ChannelAttention, pool=module.gate, fc=nn.Identity(), act=nn.Identity())


def _scale(module: Any) -> nn.Module:
    alpha = module.alpha.detach()
    norm = nn.BatchNorm2d(module.channels, eps=0.0).to(alpha)
    with torch.no_grad():
        norm.weight.copy_(alpha.expand(module.channels))
    return norm.requires_grad_(module.alpha.requires_grad)


def _stages(module: nn.Module) -> nn.Module:
    shell = _shell(TorchVision, m=_sequential(module))
    shell.split = True  # type: ignore[assignment]
    return shell


def _sequential(module: nn.Module) -> nn.Module:
    plain = nn.Sequential()
    for name, child in module.named_children():
        plain.add_module(name, child)
    return plain


# the visible table from a container of this package to the module of torch or Ultralytics that computes the same
STOCK: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Residual: _residual,
    Concat: _concat,
    Split: _split,
    PoolPyramid: _pool_pyramid,
    Gate: _gate,
    Scale: _scale,
}
# likewise of subclasses that only make their children, by the forward that they share
SERIES: dict[Any, Callable[[Any], nn.Module]] = {
    nn.Sequential.forward: _sequential,
    Block.forward: _sequential,
    Stages.forward: _stages,
}


def _shell(cls: type[nn.Module], **parts: nn.Module) -> nn.Module:
    """A module of `cls` around given parts, without the layers that its constructor would make."""
    shell = cls.__new__(cls)
    nn.Module.__init__(shell)
    for name, part in parts.items():
        setattr(shell, name, part)
    return shell


def _placed(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` with the mode of `old`, and with its place in an Ultralytics model if it has one."""
    new.train(old.training)
    new.__dict__.update({key: value for key, value in vars(old).items() if key in ("i", "f", "type", "np")})
    return new


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == _PACKAGE

"""`BaseModel.fuse` and `is_fused` with this package's layers, on every path that Ultralytics takes to them.

val, predict, export, the final validation of a training and `YOLO.fuse()` all call `BaseModel.fuse`. It merges our layers,
and the stock `RepConv` and `RepVGGDW` with the same arithmetic, and then runs the stock fuse for the rest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.engine import predictor, validator
from ultralytics.nn import autobackend, tasks
from ultralytics.nn.modules import Classify, Conv, ConvTranspose, Detect, RepConv, RepVGGDW
from ultralytics.nn.tasks import BaseModel

from rep_backbones.containers import Block, Parallel
from rep_backbones.foreign.fusing import KEPT
from rep_backbones.fuse import fuse
from rep_backbones.gradient_form import masked
from rep_backbones.rules import VIEWS, multi_branch
from rep_backbones.yolo import guard

_PLACE = ("i", "f", "type")  # what Ultralytics keeps on each layer of a model, and reads in its forward


def install() -> None:
    """Wrap the methods; called once, by `rep_backbones.yolo.install`."""
    VIEWS[RepConv] = view_rep_conv
    VIEWS[RepVGGDW] = view_rep_vgg_dw
    # the stock fuse merges these, a model's graph is read from its rows, and a head's layers are read by name
    KEPT.update({BaseModel, Conv, ConvTranspose, Detect, Classify})
    base: Any = BaseModel
    base.fuse = _merging_fuse(base.fuse)
    base.is_fused = _exact_is_fused(base.is_fused)
    base.load = guard.guarded(base.load)
    if not all(hasattr(module, "deepcopy") for module in (predictor, validator)):
        # up to 8.4.100, val() and predict() fuse the caller's own model; training that afterwards would train it without
        # branches
        autobackend.AutoBackend.__init__ = _fusing_a_copy(autobackend.AutoBackend.__init__)


def merge_branches(model: BaseModel) -> None:
    """Merge, in place, each multi-branch layer of an Ultralytics model into one convolution, whether the model trains or
    evaluates.

    Raises:
        FoldError: a layer cannot be merged exactly, with its path and the reason; the model is then unchanged.
    """
    layers: Any = model.model
    modes = {module: module.training for module in model.modules()}
    before = dict(layers.named_children())
    model.eval()
    try:
        fuse(layers, inplace=True)
    finally:
        for module in model.modules():  # a merged layer is new, and takes the mode of the whole
            module.training = modes.get(module, modes[model])
    drop_merged_norms(layers)
    for name, layer in layers.named_children():
        if layer is not before[name]:
            layer.__dict__.update({key: vars(before[name])[key] for key in _PLACE})
        layer.np = sum(parameter.numel() for parameter in layer.parameters())


def drop_merged_norms(model: nn.Module) -> None:
    """Leave a stock Conv whose norm was merged with its branches as the stock fuse leaves it: without the norm's place."""
    for module in model.modules():
        if isinstance(module, Conv) and type(module._modules.get("bn")) is nn.Identity:
            del module.bn
            module.forward = module.forward_fuse  # type: ignore[method-assign]


def unmerged(model: nn.Module) -> bool:
    """Whether a model has a layer that merging would change: one with branches, a convolution and its norm in a block of
    ours, or one that trains with masks.
    """
    blocks = any(isinstance(module, Block) for module in model.modules())
    return blocks or bool(multi_branch(model)) or any(True for _ in masked(model))


# ---- the stock layers, seen as ours --------------------------------------------------------------------------------------


def view_rep_conv(layer: RepConv) -> nn.Module:
    """The stock `RepConv` as a block of ours that shares its parts; fused by Ultralytics already, as its one convolution."""
    if not hasattr(layer, "conv1"):
        return nn.Sequential(layer.conv, layer.act)
    branches = {"kxk": _conv_bn(layer.conv1), "1x1": _conv_bn(layer.conv2)}
    if layer.bn is not None:
        branches["identity"] = layer.bn
    return Block(Parallel(branches), act=layer.act)


def view_rep_vgg_dw(layer: RepVGGDW) -> nn.Module:
    """The stock `RepVGGDW`, depthwise 7x7 + 3x3, as a block of ours that shares its parts; fused already, as its one
    convolution.
    """
    if not hasattr(layer, "conv1"):
        return nn.Sequential(layer.conv, layer.act)
    return Block(Parallel({"7x7": _conv_bn(layer.conv), "3x3": _conv_bn(layer.conv1)}), act=layer.act)


def _conv_bn(conv: Conv) -> nn.Module:
    return nn.Sequential(conv.conv, conv.bn) if hasattr(conv, "bn") else conv.conv


# ---- the wrappers ------------------------------------------------------------------------------------------------------


def _merging_fuse(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def fuse(self: BaseModel, *args: Any, **kwargs: Any) -> Any:
        # merged branches have no common range for their trained fake-quantization: such a model keeps them, as upstream has
        # it
        if unmerged(self) and not _is_qat(self):
            merge_branches(self)
        return stock(self, *args, **kwargs)

    return fuse


def _exact_is_fused(stock: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(stock)
    def is_fused(self: BaseModel, *args: Any, **kwargs: Any) -> bool:
        if unmerged(self):
            return False
        if "thresh" in inspect.signature(stock).parameters:
            # up to 8.4.100 "fewer than 10 norm layers" counts as fused, which a small model is from the start, and an
            # expanded one once its branches are merged
            return not any(_has_norm(module) for module in self.modules())
        return stock(self, *args, **kwargs)

    return is_fused


def _fusing_a_copy(stock: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(stock)
    first = list(signature.parameters)[1]

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        model = bound.arguments.get(first)
        if isinstance(model, BaseModel) and unmerged(model):
            bound.arguments[first] = deepcopy(model)
        stock(*bound.args, **bound.kwargs)

    return __init__


def _has_norm(module: nn.Module) -> bool:
    return isinstance(module, (Conv, ConvTranspose)) and isinstance(getattr(module, "bn", None), nn.BatchNorm2d)


def _is_qat(model: nn.Module) -> bool:
    check = getattr(tasks, "is_qat", None)
    return bool(check and check(model))

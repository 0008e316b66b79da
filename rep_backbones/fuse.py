"""fuse(): every multi-branch layer becomes one convolution, and nothing else changes.

The result is plain torch: a Block becomes `nn.Sequential(Conv2d with bias, tail...)`. Folding is done in float64 on the CPU
and cast once at the end.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from rep_backbones.containers import Block
from rep_backbones.rules import RULES, FoldError, in_float64, is_series, merges, multi_branch, seen_as

Foreign = Literal["keep", "refuse"]
# What Ultralytics writes on each row of a model; the fused layer takes its place in the graph.
ROW_MARKS = ("i", "f", "type", "np")


def fuse(
    model: nn.Module, *, inplace: bool = False, foreign: str = "keep", example: torch.Tensor | None = None
) -> nn.Module:
    """A copy of the model in eval mode with one convolution for each multi-branch layer.

    Args:
        model: a block, any nn.Module or an Ultralytics model, in eval mode; any dtype and device.
        inplace: change `model` itself and return it (a lone block is returned anew, as its type changes). All kernels are
            folded before the first layer is replaced, so a model that can't be fused stays whole.
        foreign: "keep" leaves layers of unknown types as they are; "refuse" raises for a module of an unknown type
            that holds several convolutions side by side.
        example: reserved for layers without a rule; not used by "keep" and "refuse".

    Raises:
        FoldError: in train mode, with forward hooks, with NaN or inf in the weights, for a branch that can't be folded.
        ValueError: for another `foreign`.
    """
    return fuse_and_map(model, inplace=inplace, foreign=foreign)[0]


def fuse_and_map(model: nn.Module, *, inplace: bool = False, foreign: str = "keep") -> tuple[nn.Module, dict[str, str]]:
    """`fuse`, and where each merged layer went: its dotted path before -> the path of its convolution after."""
    if foreign not in ("keep", "refuse"):
        raise ValueError(f"foreign={foreign!r} is not available; accepted are 'keep' and 'refuse'")
    _refuse_unready(model)
    if foreign == "refuse":
        _refuse_foreign(model)
    parts = _parts(model)
    folded = {path: _fold(part, path) for path, part in parts}
    if not inplace:
        model = _copied(model, [module for _, part in parts for _, module in part])
    places: dict[str, str] = {}
    for path, layer, _ in multi_branch(model):
        places[path] = _join(path, "0") if isinstance(seen_as(layer), Block) else path
    model = _replaced(model, "", folded)
    left = [path for path, _, _ in multi_branch(model)]
    if left:
        raise FoldError(f"multi-branch layers are left after fusing: {', '.join(left[:5])}")
    return model.eval(), places


def _copied(model: nn.Module, merged: list[nn.Module]) -> nn.Module:
    """A copy of the model without the numbers of what is replaced next: these are half of its memory."""
    dropped = {module for part in merged for module in part.modules()}
    kept = {id(t) for m in model.modules() if m not in dropped for t in _own(m)}
    memo: dict[int, object] = {}
    for module in dropped:
        for tensor in _own(module):
            if id(tensor) not in kept:
                memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _parts(module: nn.Module, path: str = "") -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    """What folds to one convolution each: its path, and the modules in series that it is made of."""
    seen = seen_as(module)
    if merges(seen):
        return [(path, [("", seen)])]
    if isinstance(seen, Block) and is_series(seen):
        tails = [part for name, tail in list(seen.named_children())[1:] for part in _parts(tail, _join(path, name))]
        return [(path, [("branches", seen.affine_part)]), *tails]
    parts: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    children = list(seen.named_children())
    for index, (name, child) in enumerate(children):
        if (
            is_series(seen)
            and type(child) is nn.BatchNorm2d
            and index
            and (type(children[index - 1][1]) is nn.Conv2d or merges(children[index - 1][1]))
        ):
            previous, before = children[index - 1]
            parts = [p for p in parts if p[0] != _join(path, previous)]
            parts.append((_join(path, previous), [(previous, before), (name, child)]))
            continue
        parts += _parts(child, _join(path, name))
    return parts


def _fold(modules: list[tuple[str, nn.Module]], path: str) -> nn.Conv2d:
    """One convolution, on the modules' device and in their dtype."""
    name, only = modules[0]
    try:
        value = in_float64(only if len(modules) == 1 else nn.Sequential(*(m for _, m in modules)))
    except FoldError as error:
        raise error.below(_join(path, name if len(modules) == 1 else "")) from error
    like = next((p for _, m in modules for p in m.parameters()), torch.empty(0))
    value = value.to(like.dtype)
    if not value.weight.sum(dtype=torch.float64).isfinite():
        raise FoldError(f"the merged kernel does not fit into {like.dtype}; fuse in float32: model.float()", path)
    return value.to_conv().to(like.device).requires_grad_(like.requires_grad)


def _replaced(module: nn.Module, path: str, folded: dict[str, nn.Conv2d]) -> nn.Module:
    seen = seen_as(module)
    if isinstance(seen, Block) and path in folded:
        tails = [_replaced(tail, _join(path, name), folded) for name, tail in list(seen.named_children())[1:]]
        return _marked(nn.Sequential(folded[path], *tails), module)
    if path in folded:
        return _marked(folded[path], module)
    children = list(seen.named_children())
    for index, (name, child) in enumerate(children):
        if is_series(seen) and type(child) is nn.BatchNorm2d and index and _join(path, children[index - 1][0]) in folded:
            setattr(module, name, nn.Identity())  # merged into the one in front; the places behind keep their index
            continue
        new = _replaced(child, _join(path, name), folded)
        if new is not child:
            setattr(module, name, new)
    return module


def _refuse_unready(model: nn.Module) -> None:
    merged = [path for path, _ in _parts(model)]
    for path, module in model.named_modules():
        if module.training:
            raise FoldError(
                "is in train mode, where batch normalization depends on its batch; call model.eval() before fuse(model)",
                path or "the model",
            )
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked and any(path == m or path.startswith(f"{m}.") or not m for m in merged):
            raise FoldError(
                "has forward hooks, which fusing would lose; remove them (handle.remove()) before fuse(model)",
                path or "the model",
            )


def _refuse_foreign(model: nn.Module) -> None:
    for path, module in model.named_modules():
        convs = sum(isinstance(c, nn.Conv2d) for c in module.children())
        if convs > 1 and not isinstance(module, (nn.Sequential, nn.ModuleList)) and type(module) not in RULES:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise FoldError(
                f"{kind} holds {convs} convolutions and has no rule; register one in rep_backbones.rules.RULES or VIEWS",
                path,
            )


def _marked(fused: nn.Module, original: nn.Module) -> nn.Module:
    for mark in ROW_MARKS:
        if mark in vars(original):
            setattr(fused, mark, vars(original)[mark])
    return fused.eval()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name

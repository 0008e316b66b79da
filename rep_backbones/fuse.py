"""fuse(): every multi-branch layer becomes one convolution, and nothing else changes.

The result is plain torch: a Block becomes `nn.Sequential(Conv2d with bias, tail...)`. Folding is done in float64 on the CPU
and cast once at the end.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rep_backbones.affine import AffineConv, AlgebraError
from rep_backbones.containers import Block, children_of
from rep_backbones.foreign.fusing import Found, fuse_measured
from rep_backbones.foreign.measure import MEMORY
from rep_backbones.gradient_form import unmask
from rep_backbones.pairs import NORMS
from rep_backbones.rules import (
    RULES,
    FoldError,
    in_float64,
    is_finite,
    is_series,
    merges,
    multi_branch,
    placed,
    refuse_unready,
    seen_as,
)


class Fused(NamedTuple):
    """A fused model, and how it came about.

    Attributes:
        model: fused, in eval mode.
        places: where each layer that was merged by rules went: its dotted path before -> that of its convolution after.
        foreign: modules without a rule that were measured, and what became of each.
    """

    model: nn.Module
    places: dict[str, str]
    foreign: list[Found]


def fuse(
    model: nn.Module, *, inplace: bool = False, foreign: str = "keep", example: Any = None, memory: int = MEMORY
) -> nn.Module:
    """A copy of the model in eval mode with one convolution for each multi-branch layer.

    Args:
        model: a block, any nn.Module or an Ultralytics model, in eval mode; any dtype and device. On the meta device it
            gives the shapes of the fused model.
        inplace: change `model` itself and return it (a lone block is returned anew, as its type changes). All kernels are
            folded before the first layer is replaced, so a model that can't be fused stays whole.
        foreign: what to do with layers of unknown types. "keep" leaves them as they are; "refuse" raises for those
            that hold several convolutions side by side; "measure" finds what is affine in them by its answers to impulses,
            proves it in float64, and merges it where that takes no more FLOPs. What is not proved stays as it is; `report`
            tells what and why.
        example: for "measure": an input of the model, on its device, such as one small picture `(1, 3, 64, 64)`.
        memory: for "measure": bytes that its intermediate results may take.

    Raises:
        FoldError: in train mode, with forward hooks, with NaN or inf in the weights, for a branch that can't be folded.
        ValueError: for another `foreign`, and for "measure" without an example, or with one that the model does not take.
        TypeError: for anything but a module.
    """
    return report(model, inplace=inplace, foreign=foreign, example=example, memory=memory).model


def report(
    model: nn.Module, *, inplace: bool = False, foreign: str = "keep", example: Any = None, memory: int = MEMORY
) -> Fused:
    """`fuse`, and where each layer went, and what became of those without a rule; arguments and errors as there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse takes a torch.nn.Module, got {type(model).__name__}; of a YOLO(...) give its .model")
    if foreign not in ("keep", "refuse", "measure"):
        raise ValueError(f"foreign={foreign!r} is not available; accepted are 'keep', 'refuse' and 'measure'")
    if foreign == "measure" and example is None:
        raise ValueError("foreign='measure' needs example=..., an input of the model, such as torch.rand(1, 3, 64, 64)")
    parts = list(_parts(model))
    _refuse_unready(model, parts)
    if foreign == "refuse":
        _refuse_foreign(model)
    convs: dict[tuple[int, ...], nn.Conv2d] = {}  # what is used twice is folded once, and stays one layer
    for part in parts:
        if part.key not in convs:
            convs[part.key] = _fold(part)
    folded = {part.path: convs[part.key] for part in parts}
    if not inplace:
        model = _copied(model, parts)
    places: dict[str, str] = {}
    for path, layer, _ in multi_branch(model):
        places[path] = _join(path, "0") if isinstance(seen_as(layer), Block) else path
    model = _replaced(model, "", folded, {})
    unmask(model)
    left = [path for path, _, _ in multi_branch(model)]
    if left:
        raise FoldError(f"multi-branch layers are left after fusing: {', '.join(left[:5])}")
    found: list[Found] = []
    if foreign == "measure":
        model, found = fuse_measured(model, example, memory)
    return Fused(model.eval(), places, found)


@dataclass(frozen=True)
class _Part:
    """What folds to one convolution, at `path`: modules in series, each with its own path."""

    path: str
    series: list[tuple[str, nn.Module]]

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(id(module) for _, module in self.series)


def _parts(module: nn.Module, path: str = "") -> Iterator[_Part]:
    seen = seen_as(module)
    if merges(seen):
        yield _Part(path, [(path, seen)])
        return
    children = children_of(seen)
    if isinstance(seen, Block) and is_series(seen):
        yield _Part(path, [(_join(path, "branches"), seen.affine_part)])
        children = children[1:]
    previous: tuple[str, nn.Module] | None = None
    for name, child in children:
        if previous is not None and is_series(seen) and _pairs(previous[1], child):
            yield _Part(_join(path, previous[0]), [(_join(path, n), m) for n, m in (previous, (name, child))])
            previous = None
            continue
        if previous is not None:
            yield from _parts(previous[1], _join(path, previous[0]))
        previous = name, child
    if previous is not None:
        yield from _parts(previous[1], _join(path, previous[0]))


def _pairs(first: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm in series behind `first` folds into it. A plain convolution that is not affine is left as it is."""
    if not isinstance(norm, NORMS) or type(norm) not in NORMS or norm.running_mean is None:
        return False
    if merges(seen_as(first)):
        return True
    if type(first) is not nn.Conv2d:
        return False
    try:
        AffineConv.from_conv(first)
    except AlgebraError:
        return False
    return True


def _copied(model: nn.Module, parts: list[_Part]) -> nn.Module:
    """A copy of the model without the numbers of what is replaced next: these are half of its memory."""
    replaced = [path for part in parts for path, _ in part.series]
    inside = {module for part in parts for _, root in part.series for module in root.modules()}
    # a module that has a second place, where it is not replaced, keeps its numbers
    elsewhere = {m for path, m in model.named_modules(remove_duplicate=False) if m in inside and not _within(path, replaced)}
    dropped = inside - elsewhere
    kept = {id(t) for m in model.modules() if m not in dropped for t in _own(m)}
    memo: dict[int, object] = {}
    for module in dropped:
        for tensor in _own(module):
            if id(tensor) not in kept:
                memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") or not root for root in roots)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _fold(part: _Part) -> nn.Conv2d:
    """One convolution, on the modules' device, in their dtype and memory format."""
    modules = [module for _, module in part.series]
    try:
        value = in_float64(modules[0] if len(modules) == 1 else nn.Sequential(*modules))
    except FoldError as error:
        index, _, rest = error.path.partition(".") if len(modules) > 1 else ("0", "", error.path)
        at = part.series[int(index)][0] if index else part.path
        raise type(error)(error.reason, _join(at, rest)) from error
    like = next((p for m in modules for p in m.parameters()), torch.empty(0))
    conv = value.to_conv(like.dtype)
    for name, tensor in (("kernel", conv.weight), ("bias", conv.bias)):
        if tensor is not None and not is_finite(tensor, torch.float64):
            raise FoldError(f"the merged {name} does not fit into {like.dtype}; fuse in float32: model.float()", part.path)
    conv = conv.to(like.device).requires_grad_(like.requires_grad)
    kernels = [p for m in modules for p in m.parameters() if p.dim() == 4]
    last = any(not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    return conv.to(memory_format=torch.channels_last) if last else conv  # type: ignore[call-overload]


def _replaced(
    module: nn.Module, path: str, folded: dict[str, nn.Conv2d], done: dict[int, tuple[nn.Module, nn.Module]]
) -> nn.Module:
    """The module with its folded parts in their places; `done` knows what was replaced already, under another name."""
    seen = seen_as(module)
    if path in folded and not isinstance(seen, Block):
        return placed(folded[path], module)
    if id(module) in done:
        return done[id(module)][1]
    new = module
    children = children_of(seen)
    if isinstance(seen, Block) and path in folded:
        tail = OrderedDict((str(i), _replaced(m, _join(path, n), folded, done)) for i, (n, m) in enumerate(children[1:], 1))
        new = placed(nn.Sequential(OrderedDict({"0": folded[path], **tail})), module)
    else:
        for index, (name, child) in enumerate(children):
            before = _join(path, children[index - 1][0]) if index else ""
            if is_series(seen) and before in folded and _pairs(children[index - 1][1], child):
                setattr(module, name, nn.Identity())  # merged into the one in front; the places behind keep their index
                continue
            replacement = _replaced(child, _join(path, name), folded, done)
            if replacement is not child:
                setattr(module, name, replacement)
    done[id(module)] = module, new  # the old one is held, so that no other takes its id
    return new


def _refuse_unready(model: nn.Module, parts: list[_Part]) -> None:
    for path, module in model.named_modules():
        if module.training:
            raise FoldError(
                "is in train mode, where batch normalization depends on its batch; call model.eval() before fuse(model)",
                path or "the model",
            )
    whole = {path for path, module in model.named_modules() if isinstance(seen_as(module), Block)}
    places = {part.path for part in parts} & whole
    for path, module in model.named_modules():
        if path in places and (module._forward_hooks or module._forward_pre_hooks):
            refuse_unready(module, path)
    for part in parts:
        for path, module in part.series:
            refuse_unready(module, path)


def _refuse_foreign(model: nn.Module) -> None:
    unknown = []
    for path, module in model.named_modules():
        convs = sum(isinstance(c, nn.Conv2d) for c in module.children())
        if convs > 1 and not isinstance(module, (nn.Sequential, nn.ModuleList)) and type(module) not in RULES:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            unknown.append((path, f"{kind} holds {convs} convolutions"))
    if unknown:
        (path, first), others = unknown[0], [f"{path} ({what})" for path, what in unknown[1:6]]
        more = f"; so do {', '.join(others)}{' ...' * (len(unknown) > 6)}" if others else ""
        raise FoldError(
            f"{first} and has no rule{more}. Register one in rep_backbones.rules.RULES or VIEWS, or measure what they are: "
            "foreign='measure', example=an input of the model",
            path,
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name

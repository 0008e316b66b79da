"""What each module type is as an affine value: a visible table from exact types to rules.

A rule is `rule(module, channels) -> AffineConv`; `channels` is the number of input channels where a neighbour knows it,
else None. Types match exactly: a subclass that changes `forward` must not be folded as its parent. Extend by
`rules.RULES[MyLayer] = my_rule`; a layer of someone else's that sums branches in its own `forward` is shown as one of ours
by `rules.VIEWS[TheirLayer] = view`, where `view(layer)` returns a Block or Sequential that shares its submodules.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones import affine
from rep_backbones.affine import AffineConv, AlgebraError, pair
from rep_backbones.containers import (
    Block,
    Concat,
    Filter,
    PaddedBatchNorm2d,
    Parallel,
    Scale,
    Subsample,
    children_of,
    runs_in_series,
)

Rule = Callable[[Any, int | None], AffineConv]

# What Ultralytics writes on each row of a model; the fused layer takes its place in the graph.
ROW_MARKS = ("i", "f", "type", "np")

# The type of what is made from a channel count alone, until a neighbour gives its own: 1 / 9 is then rounded last.
_EXACT = torch.empty(0, dtype=torch.float64)


class FoldError(ValueError):
    """A layer that can't be folded: why, and what to do. `path` is its dotted path, "" for the root."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.path = path

    def below(self, name: str) -> FoldError:
        """The same error as seen from the parent that calls this module `name`."""
        return type(self)(self.reason, ".".join(part for part in (name, self.path) if part))


class NeedsChannels(FoldError):
    """A module such as Identity, whose value depends on a channel count that only a neighbour knows."""


def _known(module: nn.Module, channels: int | None) -> int:
    if channels is None:
        raise NeedsChannels(
            f"{type(module).__name__} alone does not say how many channels it has; give it a neighbour that does"
        )
    return channels


def _average_pool(module: nn.AvgPool2d, channels: int | None) -> AffineConv:
    padding = pair(module.padding)
    if module.ceil_mode or module.divisor_override or (any(padding) and not module.count_include_pad):
        raise AlgebraError(
            "average pooling is a convolution only with count_include_pad=True, ceil_mode=False and no divisor_override"
        )
    return affine.average_pool(_known(module, channels), pair(module.kernel_size), pair(module.stride), padding, _EXACT)


def _series(module: nn.Sequential, channels: int | None) -> AffineConv:
    children = children_of(module)
    values = _values(children, channels, in_series=True)
    return _chained([name for name, _ in children], values) if values else affine.identity(_known(module, channels), _EXACT)


def _chained(names: list[str], values: list[AffineConv]) -> AffineConv:
    total = values[0]
    for name, value in zip(names[1:], values[1:]):
        try:
            total = total.then(value, regroup=True)
        except AlgebraError as error:
            raise FoldError(str(error), name) from error
    return total


def _parallel(module: Parallel, channels: int | None) -> AffineConv:
    # the smallest first: what is embedded in a large kernel is then the sum of all small ones, once
    first, *others = sorted(_branches(module, channels), key=lambda value: value.kernel_size)
    return sum(others, start=first)


def _branches(module: Parallel, channels: int | None) -> list[AffineConv]:
    """The branches' values; depthwise ones are written into the groups of the others."""
    values = _values(list(module.items()), channels, in_series=False)
    groups = math.gcd(*(v.groups for v in values))
    return [v.regrouped(groups) for v in values]


def _concat(module: Concat, channels: int | None) -> AffineConv:
    return affine.concat(_parts_of_concat(module, channels))


def _parts_of_concat(module: Concat, channels: int | None) -> list[AffineConv]:
    parts = [(f"parts.{name}", part) for name, part in children_of(module.parts)]
    return [v.dense() for v in _values(parts, channels, in_series=False)]


def _zero_pad(module: nn.ZeroPad2d, channels: int | None) -> AffineConv:
    left, right, top, bottom = module.padding
    if left != right or top != bottom:
        raise AlgebraError(f"padding {module.padding} differs between opposite sides, which no convolution does")
    return replace(affine.identity(_known(module, channels), _EXACT), padding=(top, left))  # a negative one crops


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: lambda m, c: AffineConv.from_conv(m),
    nn.BatchNorm2d: lambda m, c: affine.batch_norm(m),
    nn.SyncBatchNorm: lambda m, c: affine.batch_norm(m),
    PaddedBatchNorm2d: lambda m, c: replace(affine.batch_norm(m.bn), padding=m.padding),
    Scale: lambda m, c: affine.per_channel(m.alpha.expand(m.channels)),
    nn.Identity: lambda m, c: affine.identity(_known(m, c), _EXACT),
    nn.Dropout: lambda m, c: affine.identity(_known(m, c), _EXACT),
    nn.Dropout2d: lambda m, c: affine.identity(_known(m, c), _EXACT),
    Subsample: lambda m, c: affine.subsample(_known(m, c), pair(m.stride), _EXACT),
    nn.AvgPool2d: _average_pool,
    nn.ZeroPad2d: _zero_pad,
    Filter: lambda m, c: AffineConv(m.kernel, None, padding=m.padding, groups=m.channels),
    nn.Sequential: _series,
    Parallel: _parallel,
    Concat: _concat,
}

# what becomes one convolution where it stands, without a Block around it
MERGED: set[type[nn.Module]] = {Parallel, Concat}

VIEWS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def equivalent(module: nn.Module, channels: int | None = None) -> AffineConv:
    """The affine value of a module in its own dtype, differentiable.

    Args:
        module: any module whose type has a rule.
        channels: the number of input channels, for modules that do not know it.

    Raises:
        FoldError: for a type without a rule, or a composition without an exact value; with the path of the culprit.
    """
    rule = RULES.get(type(module))
    if rule is None:
        kind = type(module)
        raise FoldError(
            f"{kind.__module__}.{kind.__qualname__} has no rule (types match exactly). Register one: "
            f"rep_backbones.rules.RULES[{kind.__name__}] = rule, where rule(module, channels) returns an AffineConv"
        )
    try:
        return rule(module, channels)
    except AlgebraError as error:
        raise FoldError(str(error)) from error


def equivalent_conv(module: nn.Module) -> AffineConv:
    """The one convolution that a multi-branch layer computes in front of its activation.

    Returns:
        The value: weight `(c2, c1 / g, kh, kw)` and bias `(c2,)` in float64, on the CPU.

    Raises:
        FoldError: as `equivalent`, for NaN or inf, in train mode, and with forward hooks.
    """
    seen = seen_as(module)
    refuse_unready(module)
    return in_float64(seen.affine_part if isinstance(seen, Block) else seen)


def refuse_unready(module: nn.Module, path: str = "") -> None:
    """Refuse what a fold would silently lose: train mode, forward hooks, and a `forward` put on one instance.

    Raises:
        FoldError: with the path, below `path`, and what to do.
    """
    for name, inner in module.named_modules():
        if inner.training and not inner._modules:  # a container computes the same in both modes, and a view's is new
            reason = "is in train mode, where batch normalization depends on its batch; call .eval() first"
        elif inner._forward_hooks or inner._forward_pre_hooks:
            reason = "has forward hooks, which fusing would lose; remove them (handle.remove()) first"
        elif type(inner) in RULES and "forward" in vars(inner):
            reason = "has a forward of its own in place of its class's, which fusing would lose; subclass it instead"
        else:
            continue
        raise FoldError(reason, ".".join(part for part in (path, name) if part) or "the model")


def in_float64(module: nn.Module) -> AffineConv:
    """`equivalent` of a module of any dtype and device, computed in float64 on the CPU, without a graph.

    Raises:
        FoldError: as `equivalent`, and for NaN or inf.
    """
    check_numbers(module)
    with torch.no_grad():
        return equivalent(doubled(module)).to(torch.float64)


def branch_values(part: nn.Module) -> dict[str, AffineConv]:
    """Each branch's own share of a merged kernel, by name, in float64: their weights add up to the kernel's.

    Args:
        part: a Parallel or Concat, or a series or wrapper that holds one, whose other layers act on each branch.

    Raises:
        FoldError: as `equivalent`, and for NaN or inf.
    """
    check_numbers(part)
    with torch.no_grad():
        return _shares(doubled(part), None)


def branch_names(part: nn.Module) -> list[str]:
    """The names that `branch_values` gives, without folding anything."""
    if type(part) is Parallel:
        return [name for name, _ in part.items()]
    if type(part) is Concat:
        return [name for name, _ in children_of(part.parts)]
    return branch_names(next(child for _, child in children_of(part) if _has_branches(child)))


def _shares(module: nn.Module, channels: int | None) -> dict[str, AffineConv]:
    if type(module) is Parallel:
        names = [name for name, _ in module.items()]
        return dict(zip(names, affine.align(_branches(module, channels))))
    if type(module) is Concat:
        parts = _parts_of_concat(module, channels)
        none = torch.zeros(1, dtype=torch.float64)
        only = [[v if i == j else v.scaled(none) for j, v in enumerate(parts)] for i in range(len(parts))]
        return {str(i): affine.concat(values) for i, values in enumerate(only)}
    children = children_of(module)
    index = next(i for i, (_, child) in enumerate(children) if _has_branches(child))
    names = [name for name, _ in children]
    values = _values(children, channels, in_series=True)
    shares = _shares(children[index][1], values[index].in_channels)
    return {name: _chained(names, [*values[:index], v, *values[index + 1 :]]) for name, v in shares.items()}


def doubled(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU."""
    # The memo makes the copy take float64 tensors at once: a plain deepcopy would hold the numbers twice in passing.
    memo: dict[int, Any] = {id(p): nn.Parameter(_on_cpu(p, torch.float64)) for p in module.parameters()}
    for b in module.buffers():
        memo[id(b)] = _on_cpu(b, torch.float64 if b.is_floating_point() else b.dtype)
    return copy.deepcopy(module, memo)


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Shapes on the meta device have no numbers to move: they stay, and fold to shapes."""
    return tensor.detach().to(tensor.device if tensor.is_meta else "cpu", dtype)


def _values(children: Iterable[tuple[str, nn.Module]], channels: int | None, in_series: bool) -> list[AffineConv]:
    """The values of neighbours; those that don't know their channels learn them from one that does."""
    children = list(children)
    values: list[AffineConv | None] = []
    for name, child in children:
        try:
            values.append(equivalent(child, channels))
        except NeedsChannels:
            values.append(None)
        except FoldError as error:
            raise error.below(name) from error
        value = values[-1]
        if value is not None:
            channels = value.out_channels if in_series else value.in_channels
    for index in range(len(children) - 1, -1, -1):
        value, (name, child) = values[index], children[index]
        if value is None:
            if channels is None:
                raise NeedsChannels(f"no neighbour says how many channels {type(child).__name__} has", name)
            value = equivalent(child, channels)
        values[index], channels = value, value.in_channels
    like = next((t for _, child in children if (t := _first_number(child)) is not None), None)
    found = [v for v in values if v is not None]
    if like is None:
        return found
    # What is made from a channel count alone (identity, pooling) takes the dtype and device of its neighbours.
    return [v if v.bias is not None else replace(v, weight=v.weight.to(like)) for v in found]


def _first_number(module: nn.Module) -> Tensor | None:
    return next((t for t in module.parameters() if t.is_floating_point()), None)


def check_numbers(module: nn.Module) -> None:
    """Refuse weights that would spread silently into every deployed kernel.

    Raises:
        FoldError: for NaN, inf or negative variances, with the path of the tensor.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # it may overflow, so it does not decide
        if tensor.is_floating_point() and not is_finite(tensor) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise FoldError(
                f"{bad} of {tensor.numel()} values are NaN or inf; the training has diverged, or weights over 65504 "
                "were stored in FP16. "
                "Go back to an earlier checkpoint, or to the FP32 weights (best_fp32.pt)",
                name,
            )
    for name, norm in module.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or norm.running_var.is_meta:
            continue
        if bad := int((norm.running_var.double() + norm.eps <= 0).sum()):
            raise FoldError(
                f"{bad} of {norm.num_features} running variances are negative, or zero with eps=0, which no training makes; "
                "the file is damaged, or its weights were changed. Go back to an earlier checkpoint",
                name,
            )


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the sum, in `dtype`, is finite: only if all values are, and it needs no memory of its own. Shapes are."""
    return tensor.is_meta or bool(tensor.sum(dtype=dtype).isfinite())


def seen_as(module: nn.Module) -> nn.Module:
    """The module itself, or what `VIEWS` shows of it."""
    view = VIEWS.get(type(module))
    return module if view is None else view(module)


def is_series(module: nn.Module) -> bool:
    """Whether a module computes its children one after the other: a Sequential with the stock forward.

    The rows of an Ultralytics model stand in a Sequential too, but its graph decides who follows whom: they carry `i` and
    `f`.
    """
    if not runs_in_series(module):
        return False
    return not any({"i", "f"} <= vars(child).keys() for child in module.children())


def merges(module: nn.Module) -> bool:
    """Whether a module, as `seen_as` shows it, becomes one convolution where it stands: branches without a Block."""
    return type(module) in MERGED and (type(module) is not Concat or _is_affine(module))


def _is_affine(module: nn.Module) -> bool:
    """Whether each layer within has a rule, so that one without was not meant to stand in front of a sum."""
    children = [child for child in module.children() if not isinstance(child, nn.ModuleList)]
    children += [child for held in module.children() if isinstance(held, nn.ModuleList) for child in held]
    return type(module) in RULES and all(map(_is_affine, children))


def _has_branches(module: nn.Module) -> bool:
    return any(type(part) in MERGED for part in module.modules())


def placed(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` in eval mode, in the place of `old` in the graph of an Ultralytics model if that has one."""
    for mark in ROW_MARKS:
        if mark in vars(old):
            setattr(new, mark, vars(old)[mark])
    return new.eval()


def multi_branch(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Every multi-branch layer of a model: dotted path, the layer (a Block, a viewed one, a Parallel), its affine part."""
    return list(_multi_branch("", model))


def _multi_branch(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    seen = seen_as(module)
    if merges(seen):
        yield path, module, seen
        return
    children = children_of(seen)
    if isinstance(seen, Block) and _has_branches(seen.affine_part):
        yield path, module, seen.affine_part
        children = children[1:]
    for name, child in children:
        yield from _multi_branch(f"{path}.{name}" if path else name, child)

"""The convolutions that `expand` can take, which of them are asked for, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from rep_backbones.affine import Pair, pair
from rep_backbones.gradient_form import masked
from rep_backbones.rules import multi_branch

Predicate = Callable[[str, nn.Conv2d], bool]
Layers = str | Iterable[str] | Predicate | None
Kernels = int | Iterable[int | tuple[int, int]] | None
_SHOWN = 8


class ExpandError(ValueError):
    """A request to `expand` that is refused: what was given, what is accepted, and what to do."""


def plain_convs(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Dotted path -> the convolution, and why it can't be expanded at all ("" where it can).

    Those within multi-branch layers are left out.
    """
    paths: dict[int, list[str]] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for path, module in modules:
        paths.setdefault(id(module), []).append(path)
    tied = Counter(id(p) for m in {id(m): m for _, m in modules}.values() for p in m.parameters(recurse=False))
    inside = [path for path, _, _ in multi_branch(model)]
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in modules:
        if not _is_conv(module) or any(path == p or path.startswith(f"{p}.") or not p for p in inside):
            continue
        reason = _unfit(module)
        others = [other for other in paths[id(module)] if other != path]
        if others:
            reason = f"is the same module as {others[0]}; each place needs a convolution of its own: copy.deepcopy it"
        elif not reason and any(tied[id(p)] > 1 for p in module.parameters(recurse=False)):
            reason = "shares its weight with another module; give it a copy of its own"
        found[path] = (module, reason)
    return found


def _is_conv(module: nn.Module) -> bool:
    quantized = type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized", "torch.nn.intrinsic"))
    return isinstance(module, nn.Conv2d) or (quantized and "Conv" in type(module).__name__)


def _unfit(module: nn.Module) -> str:
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "is parametrized; remove that first: torch.nn.utils.parametrize.remove_parametrizations"
    if kind is not nn.Conv2d:
        if "quantized" in kind.__module__ or ".qat" in kind.__module__ or "intrinsic" in kind.__module__:
            return f"is quantized ({kind.__name__}); expand the float model, and quantize after fusing"
        return f"is a {kind.__module__}.{kind.__qualname__}, not a torch.nn.Conv2d; its forward may differ"
    if "weight_g" in module._parameters:
        return "is weight-normed; remove that first: torch.nn.utils.remove_weight_norm(conv)"
    if "weight" not in module._parameters:
        return "is pruned or spectral-normed; make that lasting first: torch.nn.utils.prune.remove, remove_spectral_norm"
    if any(True for _ in masked(module)):
        return "is in the gradient form already; expand the network that it was made from"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which would be lost; remove them first (handle.remove())"
    return ""


def choose(
    convs: dict[str, tuple[Any, str]], norms: dict[str, str], layers: Layers, kernels: Kernels, without_norm: bool
) -> tuple[dict[str, nn.Conv2d], set[str]]:
    """The convolutions asked for, by path, and those of them that must be taken or refused rather than left as they are.

    Raises:
        ExpandError: for patterns that match nothing, and for convolutions that can't be expanded.
    """
    sizes = _sizes(kernels)
    named = _named(convs, layers)
    certain: set[str] = set()
    chosen: dict[str, nn.Conv2d] = {}
    for path, (conv, unfit) in convs.items():
        exact = path in named.exact
        if not exact and (path not in named.matched or not _size_fits(conv, sizes, any_size=callable(layers))):
            continue
        has_norm = path in norms or without_norm
        if unfit and (exact or has_norm or not unfit.startswith("is a ")):
            if exact or not unfit.startswith("is a "):
                raise ExpandError(f"{path} {unfit}. Nothing was changed")
            continue
        if not has_norm:
            if exact:
                raise ExpandError(
                    f"{path}: no batch normalization is seen to follow it directly (a forward that depends on its "
                    "data hides it); give batches=[...], inputs of the model to "
                    "measure the new branches' statistics on. Nothing was changed"
                )
            continue
        if exact or callable(layers) or sizes is not None:
            certain.add(path)
        chosen[path] = conv
    if not chosen:
        raise ExpandError(_nothing(convs, norms, layers, kernels))
    return chosen, certain


def _sizes(kernels: Kernels) -> set[Pair] | None:
    if kernels is None:
        return None
    given = [kernels] if isinstance(kernels, int) else kernels
    try:
        sizes = {pair(k) for k in given}
        if isinstance(kernels, str) or not all(type(n) is int for size in sizes for n in size):
            raise TypeError
    except (TypeError, ValueError):
        raise ExpandError(
            f"kernels={kernels!r} is not accepted; give a size such as 3, or several such as [3, (1, 9)]"
        ) from None
    return sizes


class _Named:
    """What `layers` names: `exact` paths, and all that are `matched`."""

    def __init__(self, exact: set[str], matched: set[str]) -> None:
        self.exact, self.matched = exact, matched


def _named(convs: dict[str, tuple[Any, str]], layers: Layers) -> _Named:
    if layers is None:
        return _Named(set(), set(convs))
    if callable(layers):
        return _Named(set(), {path for path, (conv, _) in convs.items() if layers(path, conv)})
    if not isinstance(layers, Iterable):
        raise ExpandError(f"layers={layers!r} is not accepted; give names, patterns such as 'model.*', or a predicate")
    patterns = [layers] if isinstance(layers, str) else list(layers)
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ExpandError(f"layers: {pattern!r} is no name; accepted are names, patterns such as 'model.*', a predicate")
        hits = {path for path in convs if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")}
        if not hits:
            raise ExpandError(f"layers: {pattern!r} matches no convolution. There are {_some(convs)}")
        matched |= hits
    return _Named(matched & set(patterns), matched)


def _size_fits(conv: Any, sizes: set[Pair] | None, any_size: bool) -> bool:
    size = pair(conv.kernel_size)
    return size in sizes if sizes is not None else any_size or size != (1, 1)


def _nothing(convs: dict[str, tuple[Any, str]], norms: dict[str, str], layers: Layers, kernels: Kernels) -> str:
    given = [f"layers={layers!r}"] * (layers is not None) + [f"kernels={kernels!r}"] * (kernels is not None)
    if kernels is not None and isinstance(kernels, tuple) and len(kernels) == 2:
        given[-1] += f" (sizes {kernels[0]} and {kernels[1]}; for one of both give [{kernels}])"
    asked = " and ".join(given) or "a kernel over 1x1 and a batch normalization behind it"
    if convs and not norms:
        return (
            f"no convolution has {asked}: no norm follows any of them, as in a fused model. Give batches=[...], inputs of "
            f"the model to measure the new branches' statistics on. There are {_some(convs)}"
        )
    return f"no convolution has {asked}. There are {_some(convs) or 'none'}"


def _some(convs: dict[str, tuple[Any, str]]) -> str:
    names = [f"{path} ({'x'.join(map(str, pair(conv.kernel_size)))})" for path, (conv, _) in convs.items()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


__all__ = ["ExpandError", "Kernels", "Layers", "choose", "plain_convs"]

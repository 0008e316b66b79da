"""Going through a model, module by module from the outside in: cut, measure, prove, put in place, and tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from rep_backbones.affine import AffineConv
from rep_backbones.containers import children_of
from rep_backbones.foreign.cost import Cost, cost
from rep_backbones.foreign.graph import Part, Steps
from rep_backbones.foreign.measure import MEMORY, Map, NotAConvolution, answer, measured
from rep_backbones.foreign.prove import Unproved, pictures, proved
from rep_backbones.foreign.rebuild import below, form
from rep_backbones.foreign.record import Seen, record
from rep_backbones.foreign.whole import Changes, outputs
from rep_backbones.foreign.why import unmerged_sum
from rep_backbones.rules import doubled, is_series, placed

# Types that stay as they are, with all that derive from them: others ask for their parts by name, or fuse them later.
KEPT: set[type[nn.Module]] = set()
WHOLE = 1e-9  # of a channel's largest value: what a module may be off by, behind activations that add their own rounding
TAILS = 3  # modules at the end of a forward that can't be traced, which may be set aside


@dataclass(frozen=True)
class Found:
    """A module without a rule, and what became of it.

    Attributes:
        path, type: dotted path in the model, and the class.
        outcome: "merged", or "left" as it was.
        reason: why it was left; "" where merged.
        convs_before, convs_after: convolutions that run in the part that was merged; in the whole module where left.
        error: largest difference in float64 as a fraction of a channel's largest value, over all that was compared.
        gained: what the merged part saves, in words.
    """

    path: str
    type: str
    outcome: str
    reason: str = ""
    convs_before: int = 0
    convs_after: int = 0
    error: float | None = None
    gained: str = ""


def fuse_measured(model: nn.Module, example: Any, memory: int = MEMORY) -> tuple[nn.Module, list[Found]]:
    """Merge, in place, what is affine in modules that have no rule.

    Args:
        model: in eval mode, of any dtype and device, fused by rules already.
        example: an input of the model, on its device; small pictures will do.
        memory: bytes that measuring may take for intermediate results.

    Returns:
        The model (a new one if it was itself replaced), and what was found, in the order of the modules.

    Raises:
        ValueError: the model does not take the example.
    """
    expected: list[Tensor] = []
    try:
        seen = record(model, lambda: expected.extend(outputs(model(example))))
    except Exception as error:  # whatever the model raises
        raise ValueError(
            f"the model fails on the example ({type(error).__name__}: {error}); give an input that it takes, in its own "
            "type and on its device"
        ) from error
    work, changes = _Work(model, seen, memory), Changes(model)
    new = work.visit(model)
    work.take_back(changes.unbearable(lambda: new(example), expected))
    return new, work.found


class _NoSteps(ValueError):
    """A forward that can't be taken apart: why."""


class _Left(ValueError):
    """A module that is left as it was: why."""


@dataclass(frozen=True)
class _Merged:
    """A part (None: all in front of the last modules), the convolution that it is, and what that saves."""

    part: Part | None
    value: AffineConv
    error: float
    before: Cost
    after: Cost


class _Work:
    def __init__(self, model: nn.Module, seen: Mapping[nn.Module, Seen], memory: int) -> None:
        self.found: list[Found] = []
        self._seen = seen
        self._memory = memory
        self._paths = {module: path for path, module in model.named_modules()}
        self._done: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module) -> nn.Module:
        """The module with its parts merged, and what is left of it visited in turn."""
        if module in self._done:
            return self._done[module]
        new = self._done[module] = self._fused(module)
        for name, child in [*new._modules.items()]:
            if child is not None:
                new._modules[name] = self.visit(child)
        return new

    def take_back(self, left: Mapping[nn.Module, str]) -> None:
        """Tell of merged modules that the model did not bear."""
        for module, reason in left.items():
            path = self._paths[module]
            for index, found in enumerate(self.found):
                if found.outcome == "merged" and (found.path == path or path.startswith(f"{found.path}.")):
                    self.found[index] = replace(
                        found, outcome="left", reason=reason, convs_after=found.convs_before, error=None, gained=""
                    )

    def _fused(self, module: nn.Module) -> nn.Module:
        seen = self._seen.get(module, Seen())
        if seen.convs < 1 or any(base in KEPT for base in type(module).__mro__):
            return module
        try:
            if _hooked(module):
                raise _Left("has forward hooks, which fusing would lose; remove them (handle.remove()) first")
            if seen.x is None or seen.steps < 2 or any(map(_hooked, module.modules())) or self._apart(module):
                return module
            with _float64_by_default():
                return self._taken_apart(module, seen, seen.x.double())
        except (_Left, Unproved, NotAConvolution) as error:
            self._note(module, outcome="left", reason=str(error), convs_before=seen.convs, convs_after=seen.convs)
            return module

    def _apart(self, module: nn.Module) -> bool:
        """Whether a module is a plain series in which no two neighbours may merge: each is visited for itself."""
        bent = [self._seen.get(m, Seen()).curved and not self._opens(m) for _, m in children_of(module)]
        return is_series(module) and all(a or b for a, b in pairwise(bent))

    def _opens(self, module: nn.Module) -> bool:
        """Whether a module is a norm and an activation: the norm may belong to the convolution in front."""
        seen = self._seen.get(module, Seen())
        return seen.curved and not seen.convs and _norms(module)

    def _taken_apart(self, module: nn.Module, seen: Seen, x: Tensor) -> nn.Module:
        try:
            double = _doubled(module)
        except Exception as error:  # whatever other people's classes do when they are copied
            raise _Left(f"can't be copied ({type(error).__name__}: {error})") from error
        twins = dict(zip(double.modules(), module.modules()))
        try:
            steps = self._steps(double, twins, x)
        except _NoSteps as error:
            return self._set_aside(module, double, x, str(error))
        parts, refused = self._parts(steps)
        if reason := unmerged_sum(steps, list(parts), refused, lambda m: self._of(twins, m).convs > 0):
            self._note(module, outcome="left", reason=reason, convs_before=seen.convs, convs_after=seen.convs)
        if not parts:
            return module
        made = form(steps, list(parts), module)
        exact = {part: found.value.to_conv() for part, found in parts.items()}

        def candidate(picture: Tensor) -> Tensor:
            with made.built(double, exact) as built:
                result: Tensor = built(picture)
                return result

        worst = proved(double, candidate, _around(x, steps.decided), WHOLE)
        like = _first_number(module)
        convs = {part: _cast(found.value, like) for part, found in parts.items()}
        new = placed(made.build(module, convs), module)
        for part, found in parts.items():
            inner = [below(n) for n in part.inside if n.op == "call_module"]
            names = [] if new is not module else inner[:1]
            self._note_merged(module, names, found, max(worst, found.error))
        return new

    def _of(self, twins: Mapping[nn.Module, nn.Module], module: nn.Module) -> Seen:
        return self._seen.get(twins.get(module, module), Seen())

    def _steps(self, double: nn.Module, twins: Mapping[nn.Module, nn.Module], x: Tensor) -> Steps:
        def curved(m: nn.Module) -> bool:
            return self._of(twins, m).curved

        opened = {m for m in double.modules() if m is not double and self._opens(twins.get(m, m))}
        why = ""
        for some in [opened, set()] if opened else [set()]:
            try:
                return Steps(double, x, some, curved)
            except Exception as error:  # a forward that looks at its data, or is beyond torch.fx
                why = f"its forward can't be traced ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        raise _NoSteps(why)

    def _parts(self, steps: Steps) -> tuple[dict[Part, _Merged], dict[fx.Node, str]]:
        """The parts to merge, and why others that end at a step were refused."""
        merged: dict[Part, _Merged] = {}
        taken: set[fx.Node] = set()
        refused: dict[fx.Node, str] = {}
        for entry in steps.pictures():
            for part in [] if entry in taken else steps.parts_from(entry):
                one_module = len(part.inside) == 1 and part.exit.op == "call_module"  # which is visited for itself
                if one_module or taken & set(part.inside):
                    continue
                try:
                    found = self._measured(steps.as_map(part), steps.values[entry], part)
                except (NotAConvolution, Unproved, _Left) as error:
                    refused.setdefault(part.exit, str(error))
                    continue
                if found is not None:
                    merged[part] = found
                    taken |= set(part.inside) - {part.exit}
                    break
        return merged, refused

    def _measured(self, f: Map, x: Tensor, part: Part | None = None) -> _Merged | None:
        """None where there is nothing to merge."""
        picture = x.clone()
        pixels = answer(f, picture)[:, 0].numel()
        before = cost(lambda: answer(f, picture))
        if before.convs < 1 or before.steps < 2:
            return None
        value = measured(f, x.shape[1], self._memory, before.flops // (2 * max(pixels, 1)))
        error = proved(f, value, chain([x], pictures(value)))
        after = cost(lambda: value(x))
        if after.flops > before.flops:
            raise NotAConvolution("as one convolution it would take more FLOPs")
        return _Merged(part, value, error, before, after)

    def _set_aside(self, module: nn.Module, double: nn.Module, x: Tensor, why: str) -> nn.Module:
        """The module as one convolution and the last modules that it runs."""
        called = _order_of_calls(double, x)
        reasons: list[str] = []
        for count in range(min(TAILS, len(called)) + 1):
            aside = called[len(called) - count :]
            rest = [module.get_submodule(name) for name in called[: len(called) - count]]
            if any(self._seen.get(m, Seen()).curved for m in rest) or len(set(called)) != len(called):
                continue
            tails = {name: double.get_submodule(name) for name in aside}
            try:
                for name in aside:
                    double.set_submodule(name, nn.Identity())
                found = self._measured(double, x)
            except (NotAConvolution, Unproved) as refused:
                at = f"in front of its last {count} modules " if count else ""
                reasons.append(f"{why}; {at}{refused}")
                continue
            finally:
                for name, tail in tails.items():
                    double.set_submodule(name, tail)
            if found is None:
                continue
            error = proved(double, nn.Sequential(found.value.to_conv(), *tails.values()), _around(x), WHOLE)
            conv = _cast(found.value, _first_number(module))
            self._note_merged(module, [], found, max(error, found.error))
            kept = [module.get_submodule(name) for name in aside]
            return placed(nn.Sequential(conv, *kept) if kept else conv, module)
        raise _Left(reasons[0] if reasons else f"{why}, and is not affine in front of its last modules")

    def _note_merged(self, module: nn.Module, inner: list[str], found: _Merged, error: float) -> None:
        path = ".".join(filter(None, [self._paths.get(module, ""), *inner]))
        before, after = found.before, found.after
        less = f"{1 - after.flops / before.flops:.0%} fewer FLOPs" if after.flops < before.flops else "as many FLOPs"
        self.found.append(
            Found(
                path or "the model",
                type(module).__name__,
                "merged",
                convs_before=before.convs,
                convs_after=after.convs,
                error=error,
                gained=f"{before.steps} steps -> {after.steps}, {less}",
            )
        )

    def _note(self, module: nn.Module, **what: Any) -> None:
        self.found.append(Found(self._paths.get(module, "") or "the model", type(module).__name__, **what))


def _order_of_calls(module: nn.Module, x: Tensor) -> list[str]:
    order: list[str] = []
    handles = [
        child.register_forward_hook(lambda *_, name=name: order.append(name)) for name, child in module.named_children()
    ]
    try:
        with torch.no_grad():
            module(x.clone())
    except Exception as error:  # other people's code, in another type than it was made for
        raise _Left(f"its forward fails in float64 ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    return order


def _around(x: Tensor, decided: bool = True) -> Iterator[Tensor]:
    """What the model gave, and noise like it of that size and others; of many others for a forward that decides by sizes."""
    yield x
    generator = torch.Generator().manual_seed(0)
    h, w = x.shape[2:]
    spread, centre = (float(x.std()) if x.numel() > 1 else 0.0) or 1.0, float(x.mean())
    others = [(2 * h + 1, 2 * w), (4 * h, 4 * w + 1), (1, 1), (2, 3), (7, 8), (33, 32)] if decided else []
    for n, size in enumerate([(h, w), (h + 1, w), (h // 2 + 1, w + 3), *others]):
        noise = torch.randn(1 + n % 2, x.shape[1], *size, dtype=x.dtype, generator=generator)
        yield noise * spread + centre


def _doubled(module: nn.Module) -> nn.Module:
    double = doubled(module)
    for inner in double.modules():
        for name, value in [*vars(inner).items()]:
            if isinstance(value, Tensor) and value.is_floating_point():  # a constant that is neither parameter nor buffer
                setattr(inner, name, value.detach().to("cpu", torch.float64))
    return double


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _norms(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def _first_number(module: nn.Module) -> Tensor:
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))


def _cast(value: AffineConv, like: Tensor) -> nn.Conv2d:
    conv = value.to(like.dtype).to_conv()
    if not all(p.isfinite().all() for p in conv.parameters()):
        raise _Left(f"the merged kernel does not fit into {like.dtype}; fuse in float32: model.float()")
    return conv.to(like.device).requires_grad_(like.requires_grad)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """Constants that a forward makes are as exact as its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

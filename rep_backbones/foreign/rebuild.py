"""Putting convolutions in place of parts of a module, in the plainest form that the module's own steps allow.

    Alone     the module is one convolution: nn.Conv2d
    Series    a convolution and modules or known functions behind it: nn.Sequential, which needs nobody's code
    Within    modules that follow each other: the first becomes the convolution, the others nn.Identity
    Graph     anything else: torch.fx writes a forward around the convolution

Each is made twice: in float64 to be proved, and in the model's own type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rep_backbones.foreign.graph import Part, Steps
from rep_backbones.rules import is_series

Convs = Mapping[Part, nn.Conv2d]

# functions behind a sum, and the modules that compute the same; their further arguments are the modules' own
TAILS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.gelu: nn.GELU,
    F.elu: nn.ELU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.softplus: nn.Softplus,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
}


class NoForm(ValueError):
    """A module that can't be put together in some form."""


class Form(ABC):
    """One way to put convolutions in place of parts of a module.

    Raises, when it is made:
        NoForm: the module's steps do not allow it.
    """

    def __init__(self, steps: Steps, parts: list[Part]) -> None:
        self.steps = steps
        self.parts = parts

    @abstractmethod
    def build(self, module: nn.Module, convs: Convs) -> nn.Module:
        """The module with the convolutions in place; `module` is the one that was traced, in any type, and may change."""

    @contextmanager
    def built(self, module: nn.Module, convs: Convs) -> Iterator[nn.Module]:
        """`build` for a while: `module` is afterwards as it was."""
        yield self.build(module, convs)


class Alone(Form):
    def __init__(self, steps: Steps, parts: list[Part]) -> None:
        super().__init__(steps, parts)
        if len(parts) != 1 or parts[0].entry is not steps.entry or parts[0].exit is not steps.result:
            raise NoForm("it is not one convolution")

    def build(self, module: nn.Module, convs: Convs) -> nn.Module:
        return convs[self.parts[0]]


class Series(Form):
    def __init__(self, steps: Steps, parts: list[Part]) -> None:
        super().__init__(steps, parts)
        starts = {part.entry: part for part in parts}
        self._order: list[Callable[[nn.Module, Convs], nn.Module]] = []
        at = steps.entry
        while at is not steps.result:
            part = starts.get(at)
            users = set(at.users)
            if part is not None and users <= set(part.inside):
                self._order.append(lambda module, convs, part=part: convs[part])  # type: ignore[misc]
                at = part.exit
                continue
            if len(users) != 1:
                raise NoForm("its steps do not follow one after the other")
            at, before = next(iter(users)), at
            self._order.append(_tail(at, before))

    def build(self, module: nn.Module, convs: Convs) -> nn.Module:
        return nn.Sequential(OrderedDict((str(i), made(module, convs)) for i, made in enumerate(self._order)))


def _tail(node: fx.Node, before: fx.Node) -> Callable[[nn.Module, Convs], nn.Module]:
    if node.args[:1] != (before,) or any(isinstance(a, fx.Node) for a in [*node.args[1:], *node.kwargs.values()]):
        raise NoForm(f"{node.name} takes more than one value")
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        path = below(node)
        return lambda module, convs: module.get_submodule(path)
    if node.op in ("call_function", "call_method") and node.target in TAILS:
        return lambda module, convs: TAILS[node.target](*node.args[1:], **node.kwargs)
    raise NoForm(f"{node.name} has no module")


class Within(Form):
    def __init__(self, steps: Steps, parts: list[Part]) -> None:
        super().__init__(steps, parts)
        calls = Counter(str(node.target) for node in steps.graph.nodes if node.op == "call_module")
        for part in parts:
            for node in part.inside:
                plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
                if not plain or calls[str(node.target)] != 1:
                    raise NoForm("its steps are not modules that follow each other")

    def build(self, module: nn.Module, convs: Convs) -> nn.Module:
        for path, new in self._changes(convs):
            module.set_submodule(path, new)
        return module

    @contextmanager
    def built(self, module: nn.Module, convs: Convs) -> Iterator[nn.Module]:
        before = [(path, module.get_submodule(path)) for path, _ in self._changes(convs)]
        try:
            yield self.build(module, convs)
        finally:
            for path, old in before:
                module.set_submodule(path, old)

    def _changes(self, convs: Convs) -> list[tuple[str, nn.Module]]:
        return [
            (below(node), convs[part] if index == 0 else nn.Identity())
            for part in self.parts
            for index, node in enumerate(part.inside)
        ]


class Graph(Form):
    def build(self, module: nn.Module, convs: Convs) -> nn.Module:
        graph, held, new = fx.Graph(), dict[str, Any](), dict[fx.Node, fx.Node]()
        gone = {node for part in self.parts for node in part.inside}
        ends = {part.exit: part for part in self.parts}
        like = next(iter(convs.values())).weight
        for index, node in enumerate(self.steps.graph.nodes):
            if node in ends:
                name = f"merged_{index}"
                held[name] = convs[ends[node]]
                new[node] = graph.call_module(name, (new[ends[node].entry],))
            elif node not in gone:
                new[node] = graph.node_copy(node, new.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    name = below(node)
                    new[node].target = name
                    held[name] = self._held(module, node, like)
        made = fx.GraphModule(held, graph, type(module).__name__)
        made.graph.eliminate_dead_code()
        made.recompile()
        return made

    def _held(self, module: nn.Module, node: fx.Node, like: Tensor) -> Any:
        if str(node.target).startswith("m."):
            return attrgetter(below(node))(module)
        constant = getattr(self.steps.root, str(node.target))  # a tensor that the forward makes, held by the tracer
        return constant.to(like) if isinstance(constant, Tensor) and constant.is_floating_point() else constant


def below(node: fx.Node) -> str:
    """The path of what a step calls or gets, in the module that was traced."""
    return str(node.target).removeprefix("m.")


def form(steps: Steps, parts: list[Part], module: nn.Module) -> Form:
    """The plainest form there is."""
    forms: list[type[Form]] = [Alone, Series, Within]
    for kind in reversed(forms) if is_series(module) else forms:
        try:
            return kind(steps, parts)
        except NoForm:
            continue
    return Graph(steps, parts)

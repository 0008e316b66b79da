"""Cutting: the parts of a module's own `forward` that are affine from one value to another.

The forward is traced (torch.fx) on what the model gave it, with the modules inside left whole.
Each step is then tried on its own: does it answer sums with sums? From such steps the parts with one value going in and one
coming out are listed, the largest first. Whether a part is a convolution is for measuring and proving to tell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rep_backbones.foreign.cost import is_picture, tensors_in
from rep_backbones.foreign.measure import Map
from rep_backbones.foreign.trace import Tracer, apply

# steps that write into their first argument and return it; later readers of that argument read the step's result
_WRITING = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Whole(nn.Module):
    """Calls another module's `forward`, `(n, c, h, w)` -> anything, so that its other arguments take their defaults."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Any:
        return self.m.forward(x)


@dataclass(frozen=True)
class Part:
    """Steps from the value of `entry` to that of `exit`, which is the last of `inside`."""

    entry: fx.Node
    exit: fx.Node
    inside: tuple[fx.Node, ...]


class Steps:
    """A module's forward as steps with the values that they had for one input, in float64.

    Attributes:
        graph: of torch.fx; what is called stands below "m".
        values: of each step.
        fed: the steps that depend on the input.
        bent: those of them that are not affine.
        decided: whether the forward took a decision by a size, which then holds for this size.
    """

    def __init__(self, module: nn.Module, x: Tensor, opened: set[nn.Module], curved: Callable[[nn.Module], bool]) -> None:
        """Trace and run `module`, in float64, on `x`.

        Args:
            opened: modules inside whose own steps are taken in place of them.
            curved: whether a module inside is known to be no affine map.

        Raises:
            Exception: whatever tracing and running raise; the forward then depends on its data, or is beyond torch.fx.
        """
        self.root = Whole(module)
        with torch.no_grad():
            tracer = Tracer(x.clone(), opened)
            self.graph = tracer.trace(self.root)
            self.values = tracer.values
            self.decided = tracer.decided
            _read_what_was_written(self.graph)
            self.fed: set[fx.Node] = {self.entry}
            self.bent: set[fx.Node] = set()
            for node in self.graph.nodes:
                sources = [n for n in node.all_input_nodes if n in self.fed]
                if sources and node.op != "output":
                    self.fed.add(node)
                    called = self.called(node)
                    if (called is not None and curved(called)) or not self._adds_up(node, sources):
                        self.bent.add(node)

    @property
    def entry(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def result(self) -> Any:
        """The step whose value is returned."""
        return next(node for node in self.graph.nodes if node.op == "output").args[0]

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a step calls, if it is such a step."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _adds_up(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether a step answers a sum of changes of its inputs with the sum of its answers."""
        given = {n: self.values[n] for n in sources}
        if not any(True for value in given.values() for _ in tensors_in(value)):
            return True  # of sizes and the like
        generator = torch.Generator().manual_seed(0)
        first, second = ({n: _moved(v, generator) for n, v in given.items()} for _ in range(2))
        answers = []
        for moves in ((), (first,), (second,), (first, second)):
            moved = {n: _plus(v, [move[n] for move in moves]) for n, v in given.items()}
            try:
                answers.append(list(tensors_in(apply(node, self.root, {**self.values, **moved}.__getitem__))))
            except Exception:  # other values than the real ones are not accepted: it looks at its data
                return False
        for start, one, two, both in zip(*answers):
            if not (both - one - two + start).abs().max() <= 1e-9 * both.abs().max():
                return False
        return True

    # ---- parts ----------------------------------------------------------------------------------------------------------

    def parts_from(self, entry: fx.Node) -> Iterator[Part]:
        """The affine parts that start at a value, the longest first."""
        order = [node for node in self.graph.nodes if node in self.fed]
        reached: set[fx.Node] = set()
        for node in order:
            sources = {n for n in node.all_input_nodes if n in self.fed}
            if node is not entry and node not in self.bent and sources and sources <= reached | {entry}:
                reached.add(node)
        for exit in reversed([node for node in order if node in reached and is_picture(self.values[node])]):
            inside = self._behind(exit, entry)
            if all(set(node.users) <= inside for node in inside if node is not exit):
                yield Part(entry, exit, tuple(node for node in order if node in inside))

    def _behind(self, node: fx.Node, entry: fx.Node) -> set[fx.Node]:
        found, left = {node}, [node]
        while left:
            new = {n for n in left.pop().all_input_nodes if n in self.fed and n is not entry} - found
            found |= new
            left += new
        return found

    def as_map(self, part: Part) -> Map:
        """The part alone."""

        def run(x: Tensor) -> Tensor:
            local: dict[fx.Node, Any] = {part.entry: x}
            for node in part.inside:
                local[node] = apply(node, self.root, lambda n: local[n] if n in local else self.values[n])
            result: Tensor = local[part.exit]
            return result

        return run

    def pictures(self) -> list[fx.Node]:
        """The steps whose value is a picture `(n, c, h, w)` that depends on the input, in order."""
        return [node for node in self.graph.nodes if node in self.fed and is_picture(self.values.get(node))]


def _read_what_was_written(graph: fx.Graph) -> None:
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        method = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
        if (method or node.target in _WRITING) and isinstance(node.args[0], fx.Node):
            for user in [user for user in node.args[0].users if order[user] > order[node]]:
                user.replace_input_with(node.args[0], node)


def _moved(value: Any, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) * (1 + t.abs().max()) for t in tensors_in(value)]


def _plus(value: Any, moves: list[list[Tensor]]) -> Any:
    """A nest with the sum of `moves` added to its tensors, all of them new."""
    steps = [iter(move) for move in moves]

    def moved(nest: Any) -> Any:
        if isinstance(nest, Tensor) and nest.is_floating_point():
            return sum((next(step) for step in steps), start=nest.clone())
        return type(nest)(map(moved, nest)) if type(nest) in (list, tuple) else nest

    return moved(value)

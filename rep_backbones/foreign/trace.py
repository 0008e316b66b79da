"""Tracing a `forward` while it runs: torch.fx notes the steps, and each has a value from the first moment on.

So a forward may ask for sizes, take tuples apart and loop over them, which symbolic tracing alone refuses. What it decides
by sizes is then decided for these sizes: `Tracer.decided` tells, and the proof has to look at others. What it decides by the
numbers of its input is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

# what may be asked of a tensor without looking at its numbers
_OUTSIDE = {"size", "dim", "numel", "ndimension", "nelement", "stride", "is_floating_point", "is_contiguous", "element_size"}


class Peeks(TypeError):
    """A forward that decides by the numbers of its input."""


class _Known:
    """A proxy that knows its value. Mixed into torch.fx's own."""

    tracer: Any
    node: fx.Node

    def _known(self) -> Any:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor) or self.node in self.tracer.peeking:
            raise Peeks("it decides by the numbers of its input")
        self.tracer.decided = True
        return value

    def __bool__(self) -> bool:
        return bool(self._known())

    def __index__(self) -> int:
        return operator.index(self._known())

    def __int__(self) -> int:
        return int(self._known())

    def __float__(self) -> float:
        return float(self._known())

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __getattr__(self, name: str) -> Any:
        return _KnownAttribute(self, name)  # type: ignore[arg-type]


class _KnownProxy(_Known, fx.Proxy):
    pass


class _KnownAttribute(_Known, Attribute):
    pass


class Tracer(fx.Tracer):
    """Traces the forward of a root for one input.

    Attributes:
        values: of each step.
        decided: whether the forward asked for a size, or for another plain number.
        peeking: steps whose value is a plain number that depends on those of tensors.
    """

    def __init__(self, x: Tensor, opened: set[nn.Module]) -> None:
        super().__init__()
        self.values: dict[fx.Node, Any] = {}
        self.decided = False
        self.peeking: set[fx.Node] = set()
        self._x = x
        self._opened = opened
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # while it traces, torch.fx sees the calls of all modules: also those that give a step its value
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _KnownProxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "placeholder":
            self.values[node] = self._x
        elif kind != "output":
            self._running = True
            try:
                self.values[node] = value = apply(node, self.root, self.values.__getitem__)
            finally:
                self._running = False
            read = node.all_input_nodes
            outside = target in _OUTSIDE or target is getattr
            looks = any(isinstance(self.values[n], Tensor) for n in read) and not outside and _is_plain(value)
            if looks or any(n in self.peeking for n in read):
                self.peeking.add(node)
        return node


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (
        type(value) in (list, tuple) and bool(value) and all(map(_is_plain, value))
    )


def apply(node: fx.Node, root: nn.Module, value_of: Callable[[fx.Node], Any]) -> Any:
    """What a step makes of the values of those that it reads."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(root)
    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    call: Any = node.target if node.op == "call_function" else root.get_submodule(str(node.target))
    return call(*args, **kwargs)

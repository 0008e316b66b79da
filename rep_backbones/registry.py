"""The layers that model YAMLs may name."""

from __future__ import annotations

import difflib
import inspect
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from torch import nn

Repeats = Literal["stage", "inside"]
Outputs = Literal["one", "list"]
L = TypeVar("L", bound=type[nn.Module])


@dataclass(frozen=True)
class Layer:
    """A registered layer.

    Attributes:
        cls: the class, built as `cls(*leading, ...)`.
        name: its name in YAMLs.
        repeats: "stage": n > 1 makes n layers in series, the first with the stride; "inside": the layer takes n itself.
        outputs: "one" feature map of c2 channels, or a "list" of them, whose channels the layer's own `channels` tells.
    """

    cls: type[nn.Module]
    name: str
    repeats: Repeats
    outputs: Outputs = "one"

    @property
    def leading(self) -> list[str]:
        """The first arguments of the class, which are not among `parameters`."""
        if self.outputs == "list":
            return ["c1"]
        return ["c1", "c2", "n"] if self.repeats == "inside" else ["c1", "c2"]

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """What a YAML row may give behind c2, or alone where there is none, in order; n is the row's own column."""
        return list(inspect.signature(self.cls.__init__).parameters.values())[1 + len(self.leading) :]


LAYERS: dict[str, Layer] = {}  # of one output
TRUNKS: dict[str, Layer] = {}  # of a list of outputs
KNOWN = ChainMap(LAYERS, TRUNKS)  # what a row may name


@overload
def register_layer(cls: L, *, repeats: Repeats = "stage", name: str | None = None, outputs: Outputs = "one") -> L: ...
@overload
def register_layer(
    cls: None = None, *, repeats: Repeats = "stage", name: str | None = None, outputs: Outputs = "one"
) -> Callable[[L], L]: ...
def register_layer(cls: Any = None, *, repeats: Repeats = "stage", name: str | None = None, outputs: Outputs = "one") -> Any:
    """Let model YAMLs name a layer of yours; a call, or a decorator.

    Args:
        cls: an nn.Module class built as `cls(c1, c2, k=3, s=1, ...)`, `(n, c1, h, w)` -> `(n, c2, h', w')`.
        repeats: "stage" (default): a row with repeats is that many layers in series, the first of which takes the stride and
            the channel change; "inside": the class takes the repeats as its third argument, `cls(c1, c2, n, ...)`.
        name: the name in YAMLs, by default the class's own.
        outputs: "one" (default), or "list" for a trunk that is built as `cls(c1, ...)`, gives a list of feature maps, of
            which `Index` rows take one each, and has their channels as its list `channels`; its row is not repeated.

    Raises:
        TypeError: if `cls` is not an nn.Module class or does not take what `repeats` or `outputs` asks for.
        ValueError: if the name belongs to another class, or `repeats` or `outputs` is unknown.
    """
    if cls is None:
        return lambda decorated: register_layer(decorated, repeats=repeats, name=name, outputs=outputs)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a torch.nn.Module class, got {cls!r}")
    if repeats not in ("stage", "inside"):
        raise ValueError(
            f"register_layer({cls.__name__}): repeats={repeats!r} is unknown; accepted are 'stage' and 'inside'"
        )
    if outputs not in ("one", "list"):
        raise ValueError(f"register_layer({cls.__name__}): outputs={outputs!r} is unknown; accepted are 'one' and 'list'")
    key = name or cls.__name__
    layer = Layer(cls, key, repeats, outputs)
    given = list(inspect.signature(cls.__init__).parameters)[1:]
    if given[: len(layer.leading)] != layer.leading:
        raise TypeError(
            f"register_layer({cls.__name__}): with repeats={repeats!r}, outputs={outputs!r} the first arguments must be "
            f"{', '.join(layer.leading)}; they are {', '.join(given) or 'none'}"
        )
    known = KNOWN.get(key)
    same = known is not None and (known.cls.__module__, known.cls.__qualname__) == (cls.__module__, cls.__qualname__)
    if known is not None and not same:
        raise ValueError(
            f"the layer name {key!r} belongs to {known.cls.__module__}.{known.cls.__qualname__}; give another one: "
            "register_layer(cls, name=...)"
        )
    (TRUNKS if outputs == "list" else LAYERS)[key] = layer
    return cls


def layer_named(name: str) -> Layer:
    """The registered layer of that name.

    Raises:
        ValueError: naming the nearest known ones.
    """
    if name not in LAYERS:
        raise ValueError(
            f"unknown layer {name!r}: {near(name, LAYERS)}Registered are {', '.join(sorted(LAYERS))}; your own by "
            "rep_backbones.register_layer"
        )
    return LAYERS[name]


def ours() -> list[str]:
    """The names of this package's own layers."""
    return sorted(name for name, layer in LAYERS.items() if layer.cls.__module__.startswith("rep_backbones."))


def near(name: Any, known: Iterable[str]) -> str:
    """ "did you mean this or that? " of an unknown name; nothing where none is near."""
    found = difflib.get_close_matches(str(name), list(known), 3)
    return f"did you mean {' or '.join(found)}? " if found else ""

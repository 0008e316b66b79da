"""The layers that model YAMLs may name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from torch import nn

Repeats = Literal["stage", "inside"]
L = TypeVar("L", bound=type[nn.Module])


@dataclass(frozen=True)
class Layer:
    """A registered layer.

    Attributes:
        cls: the class, built as `cls(c1, c2, ...)`; with `repeats="inside"` as `cls(c1, c2, n, ...)`.
        name: its name in YAMLs.
        repeats: "stage": n > 1 makes n layers in series, the first with the stride; "inside": the layer takes n itself.
    """

    cls: type[nn.Module]
    name: str
    repeats: Repeats

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """What a YAML row may give behind c2, in order (n of `repeats="inside"` is the row's own column)."""
        names = list(inspect.signature(self.cls.__init__).parameters.values())[1:]
        return names[3:] if self.repeats == "inside" else names[2:]


LAYERS: dict[str, Layer] = {}


@overload
def register_layer(cls: L, *, repeats: Repeats = "stage", name: str | None = None) -> L: ...
@overload
def register_layer(cls: None = None, *, repeats: Repeats = "stage", name: str | None = None) -> Callable[[L], L]: ...
def register_layer(cls: Any = None, *, repeats: Repeats = "stage", name: str | None = None) -> Any:
    """Let model YAMLs name a layer of yours; a call, or a decorator.

    Args:
        cls: an nn.Module class built as `cls(c1, c2, k=3, s=1, ...)`, `(n, c1, h, w)` -> `(n, c2, h', w')`.
        repeats: "stage" (default): a row with repeats is that many layers in series, the first of which takes the stride and
            the channel change; "inside": the class takes the repeats as its third argument, `cls(c1, c2, n, ...)`.
        name: the name in YAMLs, by default the class's own.

    Raises:
        TypeError: if `cls` is not an nn.Module class or does not take what its `repeats` asks for.
        ValueError: if the name belongs to another class, or `repeats` is unknown.
    """
    if cls is None:
        return lambda decorated: register_layer(decorated, repeats=repeats, name=name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a torch.nn.Module class, got {cls!r}")
    if repeats not in ("stage", "inside"):
        raise ValueError(
            f"register_layer({cls.__name__}): repeats={repeats!r} is unknown; accepted are 'stage' and 'inside'"
        )
    wanted = ["c1", "c2"] + ["n"] * (repeats == "inside")
    given = list(inspect.signature(cls.__init__).parameters)[1:]
    if given[: len(wanted)] != wanted:
        raise TypeError(
            f"register_layer({cls.__name__}): with repeats={repeats!r} the first arguments must be {', '.join(wanted)}; "
            f"they are {', '.join(given) or 'none'}"
        )
    key = name or cls.__name__
    known = LAYERS.get(key)
    same = known is not None and (known.cls.__module__, known.cls.__qualname__) == (cls.__module__, cls.__qualname__)
    if known is not None and not same:
        raise ValueError(
            f"the layer name {key!r} belongs to {known.cls.__module__}.{known.cls.__qualname__}; give another one: "
            "register_layer(cls, name=...)"
        )
    LAYERS[key] = Layer(cls, key, repeats)
    return cls


def layer_named(name: str) -> Layer:
    """The registered layer of that name.

    Raises:
        ValueError: naming the nearest known ones.
    """
    if name not in LAYERS:
        near = difflib.get_close_matches(name, LAYERS, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown layer {name!r}: {hint}Registered are {', '.join(sorted(LAYERS))}; your own by "
            "rep_backbones.register_layer"
        )
    return LAYERS[name]

"""What a checkpoint holds, as descriptions that can do nothing: names, plain values, tensors that have not been read yet.

The classes here are the whole vocabulary of `unpickle`: a file becomes a tree of them, and `rebuild` reads that tree. None
is callable, none imports anything, and none runs code of the class that it describes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MAX_DEPTH = 64  # of nested containers; a pickle may nest a million deep, and everything that walks one would overflow
MAX_VALUES = 200_000  # one list that is referred to from many places is small in the file and huge when walked
NAMESPACES = ("ultralytics.utils.IterableSimpleNamespace", "types.SimpleNamespace")  # objects that are only a dictionary


ANEW = (
    "retrain, or save the model anew with this Ultralytics; if you trust where the file comes from, --trust (trust=True) "
    "loads it as it is, and runs the code in it"
)


class Refused(ValueError):
    """A file that is not loaded: the message says what was given, why it is refused, and what to do."""

    def __init__(self, reason: str, remedy: str = ANEW) -> None:
        super().__init__(f"{reason}; {remedy}.")
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the file refers to, such as `torch.nn.modules.conv.Conv2d`. It is a name only: nothing was looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Stored:
    """An object of the file: the name of its class, the arguments it was pickled with, and its state."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None

    def __repr__(self) -> str:  # the state may refer back to this object
        return f"<stored {self.cls}>"

    def attributes(self) -> dict[str, Any]:
        """The instance's dictionary. Raises Refused if the state is not a dictionary of names."""
        state = self.state
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise Refused(f"an object of class {self.cls} has no dictionary of attributes")
        return state


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the numbers of a tensor are: a record of the archive, by key, with its type and its number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(slots=True, eq=False)
class StoredTensor:
    """A tensor (or parameter) that has not been read: a view, by element offset, size and stride, of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


@dataclass(frozen=True, slots=True, eq=False)
class BoundMethod:
    """A method of an object of the file, by name, such as the `forward` that Ultralytics replaces when it fuses a layer."""

    owner: Stored
    name: str


Scalar = (bool, int, float, str, bytes, type(None), torch.dtype, pathlib.PurePath)


def is_key(value: Any) -> bool:
    """Whether `value` may be a dictionary's key or a set's member: a scalar, or a flat tuple of scalars.

    Hashing a tuple that nests a million deep overflows the interpreter's stack, so this is asked before anything is hashed.
    """
    return isinstance(value, Scalar) or (isinstance(value, tuple) and all(isinstance(item, Scalar) for item in value))


Read = Callable[["StoredTensor"], torch.Tensor]


def plain(value: Any, where: str, budget: Iterator[int] | None = None, read: Read | None = None) -> Any:
    """A copy of `value` if it is plain data: scalars, and lists, tuples, sets, dictionaries and namespaces of them.

    `where` names the value in messages; `budget`, shared by several calls, ends after MAX_VALUES values in all; `read`
    makes tensors of their descriptions. Raises Refused for a tensor (without `read`), a module, an object of any other
    class, for a container that holds itself, and for one that is nested too deep or too large to walk.
    """
    return _plain(value, where, 0, iter(range(MAX_VALUES)) if budget is None else budget, read)


def _plain(value: Any, where: str, depth: int, budget: Iterator[int], read: Read | None) -> Any:
    if depth > MAX_DEPTH:
        raise Refused(f"{where} is nested more than {MAX_DEPTH} deep (or holds itself)")
    if next(budget, None) is None:
        raise Refused(f"{where} holds more than {MAX_VALUES:,} values")
    if isinstance(value, Scalar):
        return value
    if read is not None and isinstance(value, StoredTensor):
        return read(value)
    if isinstance(value, Stored) and str(value.cls) in NAMESPACES:
        value = value.attributes()
    if isinstance(value, dict):
        return {key: _plain(item, f"{where}.{key}", depth + 1, budget, read) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(item, where, depth + 1, budget, read) for item in value])
    if isinstance(value, (set, frozenset)):
        return set(value)
    raise Refused(f"{where} is {describe(value)}, not plain data")


def describe(value: Any) -> str:
    """A few words on a value of the file, for messages."""
    if isinstance(value, Stored):
        return f"an object of class {value.cls}"
    if isinstance(value, Global):
        return f"the name {value}"
    if isinstance(value, StoredTensor):
        return f"a tensor of shape {value.size}"
    if isinstance(value, BoundMethod):
        return f"the method {value.name} of {describe(value.owner)}"
    if value is None:
        return "nothing"
    return f"a value of type {type(value).__name__}"

"""Reads a file of `torch.save` into descriptions (see `plain_data`) without executing anything that it says.

A pickle is a program for a stack machine; Python's own machine calls whatever the program names. This one has the same
instructions (the subset that `torch.save` writes) but the names stay names: the only functions it ever calls are the ones in
`DATA`, which make plain values. Tensors are described, and read from the archive one by one when `Archive.tensor` is asked.
"""

from __future__ import annotations

import math
import pathlib
import re
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from rep_backbones.weights import archive
from rep_backbones.yolo.allowed import LAYER_PACKAGES, STORAGES, is_described, is_dropped, within
from rep_backbones.yolo.plain_data import (
    ANEW,
    NAMESPACES,
    BoundMethod,
    Global,
    Refused,
    Storage,
    Stored,
    StoredTensor,
    describe,
    is_key,
)

MAX_PICKLE_BYTES = 32 << 20  # a YOLO11n checkpoint has 0.13 MB and 53,000 instructions, one with optimizer five times that
MAX_INSTRUCTIONS = 5_000_000


# ---------------------------------------------------------------------------------------------------------------- values
def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    pairs = [tuple(pair) for pair in args[0]] if args else []
    if not all(len(pair) == 2 and is_key(pair[0]) for pair in pairs):
        raise TypeError("an OrderedDict takes pairs of a key and a value")
    return OrderedDict(pairs)


def _set(members: Any = ()) -> set[Any]:
    if not isinstance(members, (list, tuple)) or not all(is_key(member) for member in members):
        raise TypeError("a set takes a list of scalars")
    return set(members)


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(item) is int and item >= 0 for item in value):
        raise TypeError("expected a tuple of non-negative integers")
    return value


def _bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise TypeError("bytes are stored as latin1 text")
    return text.encode("latin1")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, *_: Any) -> StoredTensor:
    """A tensor's description, if it lies within its storage and is no larger: a stride of 0 can ask for any memory."""
    size, stride = _integers(size), _integers(stride)
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or not len(size) == len(stride) <= 8:
        raise TypeError("a tensor takes a storage, an offset, a size and a stride")
    count, last = 1, offset
    for length, step in zip(size, stride):
        count *= length
        last += max(length - 1, 0) * step
    if count > storage.numel or (count > 0 and last >= storage.numel):
        raise Refused(f"a tensor of shape {size} does not fit into its storage of {storage.numel} numbers")
    return StoredTensor(storage, offset, size, stride, bool(requires_grad))


def _parameter(data: Any, requires_grad: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise TypeError("a parameter takes a tensor")
    return StoredTensor(data.storage, data.offset, data.size, data.stride, bool(requires_grad))


def _numpy_scalar(dtype: Any, data: Any) -> bool | int | float:
    code = dtype.args[0] if isinstance(dtype, Stored) and str(dtype.cls) == "numpy.dtype" and dtype.args else None
    formats = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B", "b1": "?"}
    if code not in formats or not isinstance(data, bytes):
        raise TypeError("a numpy scalar is a number")
    number: bool | int | float = struct.unpack(f"<{formats[code]}", data)[0]
    return number


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(*parts: Any) -> pathlib.PurePath:
        if not all(isinstance(part, str) for part in parts):
            raise TypeError("a path takes strings")
        return kind(*parts)

    return make


def _attribute(owner: Any, name: Any) -> Any:
    """`getattr` as files use it: an enum's member (dropped), or the method that a fused layer uses in place of `forward`."""
    if isinstance(owner, Stored) and name in ("forward", "forward_fuse"):
        return BoundMethod(owner, name)
    if isinstance(owner, Global) and is_dropped(owner) and isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name):
        return Stored(owner, (name,))
    raise Refused(f"it asks for the attribute {name!r} of {describe(owner)}")


DATA: dict[str, Callable[..., Any]] = {
    "builtins.frozenset": _set,
    "builtins.getattr": _attribute,
    "builtins.set": _set,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _bytes,
    "torch.Size": _integers,
    "torch.device": lambda *args: ":".join(str(arg) for arg in args if isinstance(arg, (str, int))),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{
        f"{module}.{prefix}{kind.__name__[4:]}": _path(kind)
        for module in ("pathlib", "pathlib._local")  # Python 3.13 writes the second
        for prefix in ("", "Pure")
        for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    },
}


# --------------------------------------------------------------------------------------------------------------- machine
class Machine:
    """The stack machine of pickle protocol 2, on which names stay names. `Machine(data).run()` gives what the file holds.

    Objects of classes in the packages `foreign` are described too; like all others they are never looked up.
    """

    def __init__(self, data: bytes, foreign: tuple[str, ...] = ()) -> None:
        self.data = data
        self.foreign = foreign
        self.position = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks that a MARK has set aside
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the program. Raises Refused for a name that is not allowed, and for a program that is not whole."""
        steps = INSTRUCTIONS
        try:
            for _ in range(MAX_INSTRUCTIONS):
                code = self.data[self.position]
                self.position += 1
                if code == STOP:
                    return self.stack.pop()
                step = steps.get(code)
                if step is None:
                    raise Refused(f"its pickle uses instruction {bytes([code])!r}, which torch.save does not write")
                step(self)
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(f"its pickle is damaged at byte {self.position} ({type(error).__name__}: {error})") from None
        raise Refused(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")

    # -- reading
    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.data):
            raise IndexError("it ends in the middle of an instruction")
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    def text(self) -> str:
        return self.take(self.number("<I")).decode("utf-8", "surrogatepass")

    def long(self) -> int:
        return int.from_bytes(self.take(self.number("<B")), "little", signed=True)

    # -- the stack
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    # -- containers
    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items are appended to something that is not a list")
        self.stack[-1].extend(items)

    def assign(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise TypeError("items are set on something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if not is_key(key):
                raise TypeError("a dictionary's key is not a scalar")
            self.stack[-1][key] = value

    def pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    # -- names and objects: here Python's own machine would import and call
    def name(self) -> None:
        module, name = self.line(), self.line()
        if not name.isidentifier():  # from protocol 4 on Python's own machine follows the dots to anywhere
            raise Refused(f"it refers to {module}.{name}, which is not a name")
        if (module, name) in NAME_MAPPING:  # protocol 2 writes the names of Python 2
            module, name = NAME_MAPPING[module, name]
        found = Global(IMPORT_MAPPING.get(module, module), name)
        self.push(found if within(found.module, self.foreign) else admitted(found))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(function, Global):
            raise Refused(f"it calls something that is not a name: {describe(function)}")
        if str(function) in DATA:
            self.push(DATA[str(function)](*args))
        elif is_dropped(function) or str(function) in NAMESPACES:
            self.push(Stored(function, args))
        else:
            raise Refused(f"it calls {function}")

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(cls, Global):
            raise Refused(f"it makes an object of {describe(cls)}")
        if not is_described(cls) and not within(cls.module, self.foreign):
            raise Refused(f"it makes an object of {describe(cls)}")
        self.push(Stored(cls, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stored):
            target.state = state
        elif not isinstance(target, OrderedDict):  # a state_dict() carries `_metadata` this way: not needed
            raise Refused(f"it sets attributes of {describe(target)}")

    def storage(self) -> None:
        key = self.stack.pop()
        if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage" and isinstance(key[1], Global)):
            raise Refused("it refers to an outside object that is not the storage of a tensor")
        _, kind, record, _, numel = key
        if not isinstance(record, str) or not re.fullmatch(r"\w{1,32}", record) or type(numel) is not int or numel < 0:
            raise Refused(f"it refers to a storage called {record!r}")
        if kind.module != "torch" or kind.name not in STORAGES:
            raise Refused(f"it refers to a storage of type {kind}")
        self.push(Storage(record, STORAGES[kind.name], numel))


def admitted(name: Global) -> Global | torch.dtype:
    """`name` if it is on the allow-list (a torch dtype is returned itself), else Refused, with the reason."""
    if name.module == "torch" and isinstance(dtype := vars(torch).get(name.name), torch.dtype):
        return dtype
    if str(name) in DATA or (name.module == "torch" and name.name in STORAGES) or is_described(name):
        return name
    if within(name.module, LAYER_PACKAGES):
        remedy = "the installed version does not have this layer: install the version that saved the file"
    else:
        remedy = "if it is a layer of yours, import the file that registers it (rep_backbones.register_layer) first"
    reason = f"it refers to {name}, which is not on the list of layers and data that a checkpoint may hold"
    raise Refused(reason, f"{remedy}; else {ANEW}")


STOP = ord(".")
INSTRUCTIONS: dict[int, Callable[[Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda m: m.number("<B"),  # PROTO: the number itself changes nothing
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(m.number("<i")),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "\x8a": lambda m: m.push(m.long()),
        "G": lambda m: m.push(m.number(">d")),
        "X": lambda m: m.push(m.text()),
        "]": lambda m: m.push([]),
        "}": lambda m: m.push({}),
        ")": lambda m: m.push(()),
        "(": Machine.mark,
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.since_mark()),
        "s": lambda m: m.assign(m.pair()),
        "u": lambda m: m.assign(m.since_mark()),
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "h": lambda m: m.push(m.memo[m.number("<B")]),
        "j": lambda m: m.push(m.memo[m.number("<I")]),
        "c": Machine.name,
        "R": Machine.reduce,
        "\x81": Machine.new_object,
        "b": Machine.build,
        "Q": Machine.storage,
    }.items()
}


# --------------------------------------------------------------------------------------------------------------- archive
class Archive:
    """A file of `torch.save` (since PyTorch 1.6): an uncompressed zip of one pickle and one record per storage.

    Use as a context manager. Every defect raises Refused; the path must be that of an existing, non-empty regular file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.unread = 2 * path.stat().st_size + 4096  # bytes that tensors may ask for: many may name one large storage
        try:
            self.zip, self.root = archive.opened(path)
        except archive.Unsound as error:
            raise Refused(error.reason, error.remedy) from None
        try:
            self._check_byte_order()
        except Refused:
            self.zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.zip.close()

    def _check_byte_order(self) -> None:
        name = f"{self.root}/byteorder"
        order = self.record(name) if name in self.zip.namelist() else b"little"
        if order != sys.byteorder.encode():
            raise Refused(f"it was saved with {order!r} byte order", f"save it on a {sys.byteorder}-endian machine")

    def record(self, name: str) -> bytes:
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
            raise Refused(f"its archive is damaged at {name} ({error})", archive.DAMAGED) from None

    def contents(self, foreign: tuple[str, ...] = ()) -> Any:
        """What was saved, as descriptions. Raises Refused for anything that is not allowed, or in a package `foreign`."""
        name = f"{self.root}/data.pkl"
        if self.zip.getinfo(name).file_size > MAX_PICKLE_BYTES:
            raise Refused(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes", "save the model without other data")
        return Machine(self.record(name), foreign).run()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor that is described, with its strides, on the CPU: floating point as float32, other types as stored."""
        storage = stored.storage
        self.unread -= math.prod(stored.size) * storage.dtype.itemsize
        if self.unread < 0:
            raise Refused("its tensors ask for more bytes than the file has", "do not use this file")
        data = self.record(f"{self.root}/data/{storage.key}")
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise Refused(f"storage {storage.key} has {len(data)} bytes for {storage.numel} numbers", archive.DAMAGED)
        if not data:
            flat = torch.empty(0, dtype=storage.dtype)
        else:
            flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        view = flat.as_strided(stored.size, stored.stride, stored.offset)
        return view.to(torch.float32 if storage.dtype.is_floating_point else storage.dtype, copy=True)

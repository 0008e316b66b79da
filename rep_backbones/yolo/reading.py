"""One row of a model YAML that names a layer of this package: read, checked, and its layer made."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn
from ultralytics.nn import tasks

from rep_backbones.registry import KNOWN, Layer
from rep_backbones.yolo import training_form

Config = dict[str, Any]

_POSITIVE = ("k", "s", "g", "d", "stride")
_ACTIVATION = re.compile(r"(?:torch\.)?nn\.(\w+)(\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One row `[from, repeats, name, args]` of a model YAML; `layer` is ours, or None for a stock one."""

    index: int
    where: str  # "backbone[3]"
    given: Any  # the row as the user wrote it
    source: int | list[int]
    repeats: int
    layer: Layer | None
    args: tuple[Any, ...] = ()  # after c2
    kwargs: dict[str, Any] = field(default_factory=dict)
    c2: int = 0  # of a trunk, which gives a list, none
    mode: str | None = None  # the form that it is trained in, where it says so

    @property
    def is_trunk(self) -> bool:
        """Whether it gives a list of outputs, of which Index rows take one each."""
        return self.layer is not None and self.layer.outputs == "list"

    def error(self, what: str) -> ValueError:
        return ValueError(f"model YAML, row {self.index} ({self.where}): {self.given}: {what}")

    @property
    def sources(self) -> list[int]:
        """Where the row takes its inputs from: indices of rows, -1 for the image in front of row 0."""
        given = [self.source] if isinstance(self.source, int) else self.source
        return [index if index >= 0 else self.index + index for index in given]


def read_rows(d: Config) -> list[Row]:
    """The rows of a model YAML, those of ours checked as far as they can be without knowing their input; ValueError for a
    bad one.
    """
    rows: list[Row] = []
    if d.get("scales") and not d.get("scale"):
        d = {**d, "scale": next(iter(d["scales"]))}  # as upstream takes it
    for section in ("backbone", "head"):
        given = d.get(section)
        if not isinstance(given, list):
            raise ValueError(f"model YAML: `{section}:` must be a list of rows [from, repeats, layer, args], got {given!r}")
        rows += [_read_row(len(rows) + place, f"{section}[{place}]", row, d) for place, row in enumerate(given)]
    return rows


def names_a_layer(d: Any) -> bool:
    """Whether a model YAML has a row that names a layer of ours; False for anything that is no model YAML."""
    sections = [d.get(key) for key in ("backbone", "head")] if isinstance(d, dict) else []
    rows = [row for section in sections if isinstance(section, list) for row in section]
    return any(
        isinstance(row, (list, tuple)) and len(row) > 2 and isinstance(row[2], str) and row[2] in KNOWN for row in rows
    )


# ---- reading a row ---------------------------------------------------------------------------------------------------


def _read_row(index: int, where: str, given: Any, d: Config) -> Row:
    row = Row(index, where, given, -1, 1, None)
    if not isinstance(given, (list, tuple)) or len(given) != 4:
        raise row.error("a row has four entries: [from, repeats, layer, args]")
    source, repeats, name, args = given
    layer = KNOWN.get(name) if isinstance(name, str) else None
    if layer is None:
        return Row(index, where, given, source, repeats, None)
    multiple = isinstance(source, (list, tuple)) and len(source) > 0
    if not all(type(i) is int for i in (source if multiple else [source])):
        raise row.error(
            "`from` must be the number of an earlier row, counted from 0, or from here if negative, "
            "or a list of such numbers"
        )
    if multiple and len(source) > 1 and _takes_one_input(layer):
        raise row.error(
            f"{layer.name} takes one input, got {len(source)}; put a Concat row in front: [{list(source)}, 1, Concat, [1]]"
        )
    row = Row(index, where, given, list(source) if multiple else source, repeats, layer)
    if any(not (0 <= i < index or (i == -1 and index == 0 and not multiple)) for i in row.sources):
        raise row.error(f"`from` must point to rows before this one, 0 to {index - 1}, or -{index} to -1, got {source!r}")
    if type(repeats) is not int or repeats < 1:
        raise row.error(f"`repeats` must be an integer of at least 1, got {repeats!r}")
    if not isinstance(args, (list, tuple)) or not args:
        raise row.error(f"the arguments must be a list, [{_accepted(layer)}], got {args!r}")
    *values, last = [value_of(argument, d) for argument in args]
    kwargs = last if isinstance(last, dict) else {}
    values = values if isinstance(last, dict) else [*values, last]
    try:
        mode = training_form.of_row(kwargs, {parameter.name for parameter in layer.parameters})
    except ValueError as error:
        raise row.error(str(error)) from error
    if any(isinstance(value, dict) for value in values) or not all(isinstance(key, str) for key in kwargs):
        raise row.error("keywords are one mapping, {name: value}, at the end of the arguments")
    if layer.outputs == "list":
        row = Row(index, where, given, row.source, repeats, layer, tuple(values), kwargs, mode=mode)
        if repeats != 1:
            raise row.error(f"{layer.name} is a whole trunk; its `repeats` must be 1, got {repeats!r}")
        _check_types(row, bind(row, 1, 0, 1))
        return row
    c2, *rest = values or [kwargs.pop("c2", None)]
    if type(c2) is not int or c2 < 1:
        raise row.error(f"the first argument, c2, is the number of output channels, an integer of at least 1, got {c2!r}")
    row = Row(index, where, given, row.source, repeats, layer, tuple(rest), kwargs, c2, mode)
    _check_types(row, bind(row, c2, c2, 1))
    return row


def _takes_one_input(layer: Layer) -> bool:
    return _hints(layer).get("c1") is int


def _hints(layer: Layer) -> dict[str, Any]:
    """The annotations of a layer's constructor; none where they cannot be resolved, which says nothing about a row."""
    try:
        return get_type_hints(layer.cls.__init__)  # type: ignore[misc]
    except Exception:
        return {}


def value_of(given: Any, d: Config) -> Any:
    """An argument as Ultralytics reads it: a string that is a literal is that literal, one that names a key of the YAML is
    its value.
    """
    if isinstance(given, dict):
        return {key: value_of(value, d) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return tuple(value_of(value, d) for value in given)
    if not isinstance(given, str):
        return given
    if given in d:
        return value_of(d[given], {})
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return given


def bind(row: Row, c1: int | list[int], c2: int, n: int) -> inspect.BoundArguments:
    """The constructor's arguments by name; ValueError for a count or a keyword that it does not take."""
    assert row.layer is not None
    first = {"c1": c1, "c2": c2, "n": n}
    try:
        return inspect.signature(row.layer.cls).bind(*(first[name] for name in row.layer.leading), *row.args, **row.kwargs)
    except TypeError as error:
        given = ", ".join(map(repr, row.args)) + "".join(f", {key}: {value!r}" for key, value in row.kwargs.items())
        got = f"{given or 'nothing'}" if row.is_trunk else f"c2={row.c2} and {given or 'nothing'}"
        raise row.error(f"{row.layer.name} takes [{_accepted(row.layer)}], got {got} ({error})") from None


def _accepted(layer: Layer) -> str:
    """The arguments that a row of this layer takes: `c2, k=3, s=1, act=True`."""
    given = [str(parameter.replace(annotation=parameter.empty)) for parameter in layer.parameters]
    return ", ".join(["c2"] * ("c2" in layer.leading) + given)


def _check_types(row: Row, bound: inspect.BoundArguments) -> None:
    """Refuse a value of another type than the constructor's annotation names, where that is a plain one."""
    assert row.layer is not None
    hints = _hints(row.layer)
    for name, value in list(bound.arguments.items())[len(row.layer.leading) :]:
        if not _fits(value, hints.get(name, Any)):
            wanted = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else hints[name]
            raise row.error(f"{row.layer.name}: {name} must be of type {wanted}, got {value!r}")
        numbers = value if isinstance(value, tuple) else (value,)
        if name in _POSITIVE and any(isinstance(number, (int, float)) and number < 1 for number in numbers):
            raise row.error(f"{row.layer.name}: {name} must be at least 1, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in (str, bool) or origin in (tuple, list):
        return isinstance(value, tuple if origin in (tuple, list) else hint)
    if hint in (None, NoneType):
        return value is None
    if origin is type:
        return isinstance(value, type)
    return origin is not None or not (isinstance(hint, type) and issubclass(hint, nn.Module)) or isinstance(value, hint)


def activation(spec: Any) -> Any:
    """A module from a spec such as `nn.LeakyReLU(0.1)`, read without eval; any other spec is returned as it is, for the
    block to judge.
    """
    match = _ACTIVATION.fullmatch(spec.strip()) if isinstance(spec, str) else None
    if match is None:
        return spec
    cls = getattr(nn, match[1], None)
    try:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError("no such class")
        call = ast.parse(f"f{match[2] or '()'}", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("not a single call")
        keywords = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        return cls(*map(ast.literal_eval, call.args), **keywords)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"act must be a class of torch.nn, as in nn.SiLU or nn.LeakyReLU(0.1), got {spec!r} ({error})"
        ) from None


def is_stock(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    if name.startswith("torchvision.ops."):
        return True
    return hasattr(nn, name[3:]) if name.startswith("nn.") else name in vars(tasks)


def unknown(name: Any) -> str:
    modules = [key for key, value in vars(tasks).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(str(name), dict.fromkeys([*KNOWN, *modules]), n=3, cutoff=0.6)
    return (
        f"unknown layer {name!r}. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"Layers of this package are {', '.join(sorted(KNOWN))}; make your own known with rep_backbones.register_layer."
    )


def make(cls: type[nn.Module], bound: inspect.BoundArguments) -> nn.Module:
    arguments = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    if "act" in arguments.arguments:
        arguments.arguments["act"] = activation(arguments.arguments["act"])  # one module for each block
    return cls(*arguments.args, **arguments.kwargs)

"""YAML rows that name a layer of this package, parsed by Ultralytics' own parser.

The parser knows channel scaling and repeats only for its own types. So each row of ours goes through it as a stand-in that
it does know, at the same place and with the same number of channels; what it made of width, depth and inputs is read off
the stand-in, and the real layer put in its place. Nothing of the scaling is written a second time here, and a row means the
same as the stock `Conv` row of the same numbers.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.utils import LOGGER

from rep_backbones.registry import LAYERS, Layer
from rep_backbones.yolo import expanding

Config = dict[str, Any]
Parser = Callable[..., tuple[nn.Sequential, list[int]]]

# upstream gives a detection head its lighter form if one of these is in the YAML, whatever else is
_MODERN = frozenset({"C3k2", "A2C2f", "C2fCIB"})
# the stages of YOLOv3 to v9, whose heads (and pretrained weights) are of the heavier form
_CLASSIC = frozenset(
    "Bottleneck BottleneckCSP C1 C2 C2f C2fAttn C3 C3Ghost C3TR C3x ELAN1 GhostBottleneck RepNCSPELAN4".split()
)
_STRIDES = ("s", "stride")
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
    c2: int = 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"model YAML, row {self.index} ({self.where}): {self.given}: {what}")

    @property
    def sources(self) -> list[int]:
        """Where the row takes its inputs from: indices of rows, -1 for the image in front of row 0."""
        given = [self.source] if isinstance(self.source, int) else self.source
        return [index if index >= 0 else self.index + index for index in given]


def parser(stock: Parser) -> Parser:
    """`stock`, Ultralytics' `parse_model`, with the layers of this package's registry known by name.

    Returns a function with the same signature `(d, ch, verbose=True) -> (layers, save)`. It raises ValueError for a bad
    row, with the row, its place, the layer, what was given and what is accepted.
    """

    @functools.wraps(stock)
    def parse_model(d: Config, ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
        rows = read_rows(d)
        try:
            parse = (
                functools.partial(_parse, stock, d, rows) if any(row.layer for row in rows) else functools.partial(stock, d)
            )
            layers, save = parse(ch=ch, verbose=verbose)
            return expanding.expanded_layers(layers, d, verbose), save
        except (KeyError, AttributeError) as error:
            if unknown := next((row for row in rows if not row.layer and not _is_stock(row.given[2])), None):
                raise unknown.error(_unknown(unknown.given[2])) from error
            raise
        except TypeError as error:  # of a stock layer, which does not say where it stands
            if culprit := _first_failing(stock, d, rows, ch):
                raise TypeError(str(culprit.error(f"{culprit.given[2]}: {error}"))) from error
            raise

    return parse_model


def _first_failing(stock: Parser, d: Config, rows: list[Row], ch: int) -> Row | None:
    """The stock row at which parsing fails, if it is one: the rows before it parse."""
    for row in rows:
        shorter = {**d, "backbone": [r.given for r in rows[: row.index + 1]], "head": []}
        try:
            _parse(stock, shorter, rows[: row.index + 1], ch, verbose=False)
        except TypeError:
            return None if row.layer else row
        except Exception:  # another error, which says what it is
            return None
    return None


def read_rows(d: Config) -> list[Row]:
    """The rows of a model YAML, those of ours checked as far as they can be without knowing their input; ValueError for a
    bad one.
    """
    rows: list[Row] = []
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
        isinstance(row, (list, tuple)) and len(row) > 2 and isinstance(row[2], str) and row[2] in LAYERS for row in rows
    )


# ---- reading a row ---------------------------------------------------------------------------------------------------


def _read_row(index: int, where: str, given: Any, d: Config) -> Row:
    row = Row(index, where, given, -1, 1, None)
    if not isinstance(given, (list, tuple)) or len(given) != 4:
        raise row.error("a row has four entries: [from, repeats, layer, args]")
    source, repeats, name, args = given
    layer = LAYERS.get(name) if isinstance(name, str) else None
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
    *values, last = [_value(argument, d) for argument in args]
    kwargs = last if isinstance(last, dict) else {}
    values = values if isinstance(last, dict) else [*values, last]
    if any(isinstance(value, dict) for value in values) or not all(isinstance(key, str) for key in kwargs):
        raise row.error("keywords are one mapping, {name: value}, at the end of the arguments")
    c2, *rest = values or [kwargs.pop("c2", None)]
    if type(c2) is not int or c2 < 1:
        raise row.error(f"the first argument, c2, is the number of output channels, an integer of at least 1, got {c2!r}")
    row = Row(index, where, given, row.source, repeats, layer, tuple(rest), kwargs, c2)
    _check_types(row, _bind(row, c2, c2, 1))
    return row


def _takes_one_input(layer: Layer) -> bool:
    return _hints(layer).get("c1") is int


def _hints(layer: Layer) -> dict[str, Any]:
    """The annotations of a layer's constructor; none where they cannot be resolved, which says nothing about a row."""
    try:
        return get_type_hints(layer.cls.__init__)  # type: ignore[misc]
    except Exception:
        return {}


def _value(given: Any, d: Config) -> Any:
    """An argument as Ultralytics reads it: a string that is a literal is that literal, one that names a key of the YAML is
    its value.
    """
    if isinstance(given, dict):
        return {key: _value(value, d) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return tuple(_value(value, d) for value in given)
    if not isinstance(given, str):
        return given
    if given in d:
        return _value(d[given], {})
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return given


def _bind(row: Row, c1: int | list[int], c2: int, n: int) -> inspect.BoundArguments:
    """The constructor's arguments by name; ValueError for a count or a keyword that it does not take."""
    assert row.layer is not None
    inside = (n,) if row.layer.repeats == "inside" else ()
    try:
        return inspect.signature(row.layer.cls).bind(c1, c2, *inside, *row.args, **row.kwargs)
    except TypeError as error:
        given = ", ".join(map(repr, row.args)) + "".join(f", {key}: {value!r}" for key, value in row.kwargs.items())
        raise row.error(
            f"{row.layer.name} takes [{_accepted(row.layer)}], got c2={row.c2} and {given or 'nothing'} ({error})"
        ) from None


def _accepted(layer: Layer) -> str:
    """The arguments that a row of this layer takes: `c2, k=3, s=1, act=True`."""
    return ", ".join(["c2", *(str(parameter.replace(annotation=parameter.empty)) for parameter in layer.parameters)])


def _check_types(row: Row, bound: inspect.BoundArguments) -> None:
    """Refuse a value of another type than the constructor's annotation names, where that is a plain one."""
    assert row.layer is not None
    hints = _hints(row.layer)
    for name, value in list(bound.arguments.items())[2:]:
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


def _is_stock(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    if name.startswith("torchvision.ops."):
        return True
    return hasattr(nn, name[3:]) if name.startswith("nn.") else name in vars(tasks)


def _unknown(name: Any) -> str:
    modules = [key for key, value in vars(tasks).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(str(name), dict.fromkeys([*LAYERS, *modules]), n=3, cutoff=0.6)
    return (
        f"unknown layer {name!r}. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"Layers of this package are {', '.join(sorted(LAYERS))}; make your own known with rep_backbones.register_layer."
    )


# ---- through the stock parser ------------------------------------------------------------------------------------------


def _parse(stock: Parser, d: Config, rows: list[Row], ch: int, verbose: bool) -> tuple[nn.Sequential, list[int]]:
    own = [row for row in rows if row.layer]
    probes = sorted({source for row in own if isinstance(row.source, list) for source in row.sources})
    config = _with_stand_ins(d, rows, probes)
    kept_act = Conv.default_act
    try:
        with _table(verbose) as table:
            layers, _ = stock(config, ch=ch, verbose=verbose)
        parsed = list(layers)
        widths = {index: _first_conv(parsed[len(rows) + place]).in_channels for place, index in enumerate(probes)}
        for row in own:
            stand_in = parsed[row.index]
            # what the YAML's activation asks for holds for stock layers inside ours too, and for no later model
            Conv.default_act = _first(stand_in, Conv).act
            parsed[row.index], arguments = _build(row, stand_in, widths)
            table.replace(row, _count(stand_in), parsed[row.index], arguments)
        table.print(len(rows))
    finally:
        Conv.default_act = kept_act
    save = {source % row.index for row in rows for source in _listed(row.source) if source != -1}
    return nn.Sequential(*parsed[: len(rows)]), sorted(save)


def _with_stand_ins(d: Config, rows: list[Row], probes: list[int]) -> Config:
    """The YAML that the stock parser gets: our rows as stock ones, and one more row for each width that is to be read."""
    config = {key: deepcopy(value) for key, value in d.items() if key not in ("backbone", "head")}
    if not config.get("scales"):
        config["scale"] = config.get("scale") or "n"  # up to 8.4.100 a C3k2 row fails where there is no scale at all
    lighter = _lighter_head(d, rows)
    stock_rows: list[Any] = []
    for row in rows:
        if row.layer is None:
            stock_rows.append(deepcopy(row.given))
            continue
        # up to 8.4.100 a c2 that happens to equal nc is not scaled; the parser rounds up, so a hair less is the same
        c2: float = row.c2 - 1e-9 if row.c2 == d.get("nc") else row.c2
        name, args = ("C3k2", [c2, False]) if lighter else ("Conv", [c2])
        lighter = False  # one such row decides the head
        source = row.source if isinstance(row.source, int) else row.source[0]
        stock_rows.append([source, row.repeats, name, args])
    config["backbone"] = stock_rows
    config["head"] = [[index, 1, "Conv", [8]] for index in probes]
    return config


def _lighter_head(d: Config, rows: list[Row]) -> bool:
    """Whether a stand-in has to tell the stock parser to make the lighter detection head.

    The YAML's key `legacy` decides. Without it the stock rows do, as upstream; a trunk made of our layers alone has the
    lighter head of today.
    """
    names = {row.given[2] for row in rows if not row.layer and isinstance(row.given[2], str)}
    legacy = d.get("legacy")
    if legacy is None:
        return not names & (_MODERN | _CLASSIC)
    if not isinstance(legacy, bool):
        raise ValueError(f"model YAML: `legacy:` must be true (the heavier head of YOLOv3 to v9) or false, got {legacy!r}")
    if legacy and names & _MODERN:
        raise ValueError(
            f"model YAML: `legacy: true` cannot be had together with a row of {', '.join(sorted(names & _MODERN))}"
        )
    return not legacy


def _build(row: Row, stand_in: nn.Module, widths: dict[int, int]) -> tuple[nn.Module, list[Any]]:
    """The real layer in place of its stand-in, and its arguments as the table prints them."""
    assert row.layer is not None
    c1 = [widths[source] for source in row.sources] if isinstance(row.source, list) else _first_conv(stand_in).in_channels
    c2, n = _outputs(stand_in), _count(stand_in)
    cls, stage = row.layer.cls, row.layer.repeats == "stage"
    bound = _bind(row, c1, c2, n)
    arguments = [*bound.arguments.values()]
    try:
        blocks = [_make(cls, bound)]
        if stage and n > 1:
            if isinstance(c1, list):
                raise ValueError(f"repeats must be 1 for a row with several inputs, got {row.repeats}")
            after = _bind(row, c2, c2, n)
            strides = [name for name in _STRIDES if name in after.signature.parameters]
            after.arguments.update(dict.fromkeys(strides, 1))
            blocks += [_make(cls, after) for _ in range(n - 1)]
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError, LookupError) as error:
        reason = str(error) or type(error).__name__
        raise row.error(f"{row.layer.name} cannot be made with c1={c1}, c2={c2} after scaling: {reason}") from error
    layer = blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)
    layer.i, layer.f, layer.type = row.index, row.source, str(cls)[8:-2].replace("__main__.", "")  # type: ignore[assignment]
    layer.np = sum(parameter.numel() for parameter in layer.parameters())  # type: ignore[assignment]
    return layer, arguments


def _make(cls: type[nn.Module], bound: inspect.BoundArguments) -> nn.Module:
    arguments = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    if "act" in arguments.arguments:
        arguments.arguments["act"] = activation(arguments.arguments["act"])  # one module for each block
    return cls(*arguments.args, **arguments.kwargs)


def _listed(source: Any) -> list[int]:
    return [source] if isinstance(source, int) else list(source)


def _first(module: nn.Module, cls: type) -> Any:
    return next(part for part in module.modules() if isinstance(part, cls))


def _first_conv(stand_in: nn.Module) -> nn.Conv2d:
    return _first(stand_in, nn.Conv2d)


def _outputs(stand_in: Any) -> int:
    """c2 of a stand-in: a C3k2, a Conv, or a Sequential of these."""
    last: Any = stand_in[-1] if isinstance(stand_in, nn.Sequential) else stand_in
    return last.conv.out_channels if isinstance(last, Conv) else last.cv2.conv.out_channels


def _count(stand_in: Any) -> int:
    if isinstance(stand_in, nn.Sequential):
        return len(stand_in)
    return 1 if isinstance(stand_in, Conv) else len(stand_in.m)


# ---- the printed table -------------------------------------------------------------------------------------------------


class _Table(logging.Filter):
    """Holds back what the stock parser logs, so that stand-ins are printed as what they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.lines: list[str] = []
        self.rows: dict[int, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        mine = record.thread == self.thread and record.funcName == "parse_model" and record.levelno == logging.INFO
        if mine:
            self.lines.append(record.getMessage())
        return not mine

    def replace(self, row: Row, n: int, layer: nn.Module, arguments: list[Any]) -> None:
        self.rows[row.index] = f"{row.index:>3}{row.source!s:>20}{n:>3}{layer.np:10.0f}  {layer.type:<45}{arguments!s:<30}"

    def print(self, rows: int) -> None:
        for line in self.lines:
            number = re.match(r"\s*(\d+)\s", line)
            if number is None or int(number[1]) < rows:
                LOGGER.info(self.rows.get(int(number[1]), line) if number else line)


@contextmanager
def _table(verbose: bool) -> Iterator[_Table]:
    table = _Table()
    if verbose:
        LOGGER.addFilter(table)
    try:
        yield table
    finally:
        LOGGER.removeFilter(table)

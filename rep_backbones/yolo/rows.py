"""YAML rows that name a layer of this package, parsed by Ultralytics' own parser.

The parser knows channel scaling and repeats only for its own types. So each row of ours goes through it as a stand-in that
it does know, at the same place and with the same number of channels; what it made of width, depth and inputs is read off
the stand-in, and the real layer put in its place. Nothing of the scaling is written a second time here, and a row means the
same as the stock `Conv` row of the same numbers.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils import LOGGER

from rep_backbones.yolo import expanding, training_form
from rep_backbones.yolo.indexing import indexed
from rep_backbones.yolo.reading import Config, Row, bind, is_stock, make, read_rows, unknown

Parser = Callable[..., tuple[nn.Sequential, list[int]]]

# upstream gives a detection head its lighter form if one of these is in the YAML, whatever else is
_MODERN = frozenset({"C3k2", "A2C2f", "C2fCIB"})
# the stages of YOLOv3 to v9, whose heads (and pretrained weights) are of the heavier form
_CLASSIC = frozenset(
    "Bottleneck BottleneckCSP C1 C2 C2f C2fAttn C3 C3Ghost C3TR C3x ELAN1 GhostBottleneck RepNCSPELAN4".split()
)
_STRIDES = ("s", "stride")


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
            if culprit := next((row for row in rows if not row.layer and not is_stock(row.given[2])), None):
                raise culprit.error(unknown(culprit.given[2])) from error
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


# ---- through the stock parser ------------------------------------------------------------------------------------------


def _parse(stock: Parser, d: Config, rows: list[Row], ch: int, verbose: bool) -> tuple[nn.Sequential, list[int]]:
    rows = indexed(rows, d, ch)
    own = [row for row in rows if row.layer]
    probes = sorted({source for row in own if isinstance(row.source, list) for source in row.sources})
    config = _with_stand_ins(d, rows, probes)
    kept_act = Conv.default_act
    mode = training_form.of_yaml(d)
    try:
        with _table(verbose) as table:
            layers, _ = stock(config, ch=ch, verbose=verbose)
        parsed = list(layers)
        widths = {index: _first_conv(parsed[len(rows) + place]).in_channels for place, index in enumerate(probes)}
        for row in own:
            stand_in = parsed[row.index]
            # what the YAML's activation asks for holds for stock layers inside ours too, and for no later model
            Conv.default_act = _first(stand_in, Conv).act
            parsed[row.index], arguments = _build(row, stand_in, widths, mode)
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
        c2: float = row.c2 - 1e-9 if row.c2 == d.get("nc") else row.c2 or 8
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


def _build(row: Row, stand_in: nn.Module, widths: dict[int, int], mode: str) -> tuple[nn.Module, list[Any]]:
    """The real layer in place of its stand-in, and its arguments as the table prints them."""
    assert row.layer is not None
    c1 = [widths[source] for source in row.sources] if isinstance(row.source, list) else _first_conv(stand_in).in_channels
    c2, n = _outputs(stand_in), _count(stand_in)
    cls, stage = row.layer.cls, row.layer.repeats == "stage"
    bound = bind(row, c1, c2, n)
    arguments = [*bound.arguments.values()]
    try:
        blocks = [make(cls, bound)]
        if stage and n > 1:
            if isinstance(c1, list):
                raise ValueError(f"repeats must be 1 for a row with several inputs, got {row.repeats}")
            after = bind(row, c2, c2, n)
            strides = [name for name in _STRIDES if name in after.signature.parameters]
            after.arguments.update(dict.fromkeys(strides, 1))
            blocks += [make(cls, after) for _ in range(n - 1)]
        blocks = [training_form.in_form(block, row.mode, mode) for block in blocks]
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError, LookupError) as error:
        reason = str(error) or type(error).__name__
        channels = f"c1={c1}" if row.is_trunk else f"c1={c1}, c2={c2} after scaling"
        raise row.error(f"{row.layer.name} cannot be made with {channels}: {reason}") from error
    layer = blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)
    layer.i, layer.f, layer.type = row.index, row.source, str(cls)[8:-2].replace("__main__.", "")  # type: ignore[assignment]
    layer.np = sum(parameter.numel() for parameter in layer.parameters())  # type: ignore[assignment]
    return layer, arguments


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

"""`Index` rows that take one output of a trunk: `[0, 1, Index, [96, 3]]`, or `[0, 1, Index, [None, 3]]`.

The stock parser believes the number of channels that an Index row gives, and the model fails later, or not at all. Of a
trunk of ours it is known: a wrong one is refused, and None is filled in.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rep_backbones.yolo.reading import Config, Row, bind, make, value_of


def indexed(rows: list[Row], d: Config, ch: int) -> list[Row]:
    """The rows with the channels of each output of a trunk filled in.

    Args:
        ch: channels of the picture.

    Raises:
        ValueError: for a wrong number of channels or output, and for any other row that takes a trunk's list; with the row
            and what is right.
    """
    trunks = {row.index: (row.given[2], _channels(row, ch)) for row in rows if row.is_trunk}
    return [_checked(row, d, trunks) for row in rows] if trunks else rows


def _channels(row: Row, ch: int) -> list[int | None]:
    """The channels of each output of a trunk, from its shapes alone; None where they depend on an input that is not the
    picture, whose channels only the stock parser knows.
    """
    channels = _shaped(row, ch)
    others = channels if row.sources == [-1] else _shaped(row, 2 * ch)
    return [c if c == other else None for c, other in zip(channels, others)]


def _shaped(row: Row, c1: int) -> list[int]:
    assert row.layer is not None
    cls, bound = row.layer.cls, bind(row, c1, 0, 1)
    try:
        try:
            with torch.device("meta"):
                trunk = make(cls, bound)
        except (RuntimeError, NotImplementedError) as error:
            if "meta tensor" not in str(error):  # a layer of the user's may need numbers while it is built
                raise
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                trunk = make(cls, bound)
        return list(trunk.channels)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise row.error(f"{row.layer.name} cannot be made: {error}") from error


def _checked(row: Row, d: Config, trunks: dict[int, tuple[str, list[int | None]]]) -> Row:
    given = [row.source] if isinstance(row.source, int) else row.source
    places = [i if i >= 0 else row.index + i for i in given if type(i) is int] if isinstance(given, (list, tuple)) else []
    found = next((place for place in places if place in trunks), None)
    if found is None:
        return row
    name, channels = trunks[found]
    if row.layer or row.given[2] != "Index" or row.given[1] != 1 or not isinstance(row.source, int):
        last = len(channels) - 1
        raise row.error(
            f"row {found}, {name}, gives a list; put a row in between: [{found}, 1, Index, [{channels[-1]}, {last}]]"
        )
    args = row.given[3] if isinstance(row.given[3], (list, tuple)) else [row.given[3]]
    values = [value_of(value, d) for value in args]
    c, i, *rest = values + [None, 0][len(values) :]
    if rest or type(i) is not int or not -len(channels) <= i < len(channels):
        outputs = ", ".join(f"{place} ({n} channels)" for place, n in enumerate(channels) if n is not None)
        raise row.error(f"Index takes [channels, output]; the outputs of row {found}, {name}, are {outputs}, got {args}")
    right = channels[i]
    if right is None and type(c) is not int:
        raise row.error(f"the channels of output {i} of row {found}, {name}, depend on its input; give their number")
    if right is not None and c is not None and (type(c) is not int or c != right):
        raise row.error(
            f"output {i} of row {found}, {name}, has {right} channels, got {c!r}; write [{right}, {i}] or [None, {i}]"
        )
    return replace(row, given=[row.source, 1, "Index", [right or c, i]])

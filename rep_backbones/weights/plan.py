"""Which layer of a file goes into which layer of a model, and what does not fit."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from rep_backbones.weights.errors import WeightsError
from rep_backbones.weights.formats import FORMATS, OURS, Format
from rep_backbones.weights.report import Report, listed
from rep_backbones.weights.transfer import transferred
from rep_backbones.weights.units import COUNTER, Unit, units_of_our_file

Tensors = dict[str, Tensor]
SIZE = "the file is of another network or size than the model"


@dataclass
class Plan:
    """What will be written, by key of the model, and what is wrong. Nothing is changed before all of it is known."""

    values: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    how: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def pair(self, source: Unit, target: Unit, tensors: dict[str, Tensor], eps: float | None) -> None:
        try:
            slots, how = transferred(source, target, tensors, eps)
        except WeightsError as error:
            self.problems.append(str(error))
            return
        self.values |= {target.keys[slot]: tensor for slot, tensor in slots.items() if slot in target.keys}
        self.used |= set(source.keys.values())
        self.how[how].append(target.name)

    def report(self, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> Report:
        return Report(
            source="",
            format="",
            loaded=tuple(key for key in tensors if key in self.used),
            unused=tuple(key for key in tensors if key not in self.used),
            missing=tuple(key for key in state if key not in self.values and not key.endswith(COUNTER)),
            folded=tuple(self.how["folded"]),
            unfolded=tuple(self.how["unfolded"]),
            notes=tuple(self.problems),
        )

    def pairs(self, sources: list[Unit], targets: list[Unit], tensors: Tensors, eps: float | None) -> None:
        for source, target in zip(sources, targets):
            self.pair(source, target, tensors, eps)

    def lacks(self, targets: list[Unit]) -> None:
        keys = [key for target in targets for key in target.keys.values() if not key.endswith(COUNTER)]
        self.problems.append(f"{len(keys)} tensors of the model are not in the file: {listed(keys)}")


def gaps(units: list[Unit], known: Format) -> list[str]:
    """The parts and the numbered layers that a file of this format must have, and has not."""
    there = {known.part(unit.name) for unit in units}
    found = []
    for index, group in enumerate(known.parts):
        absent = [part for part in group if part not in there]
        if absent and (index == 0 or len(absent) < len(group)):
            found.append(f"the file has no {listed(absent)}")
    if known.by_row:  # not all rows of a graph have tensors
        return found
    numbers: dict[str, set[int]] = defaultdict(set)
    for unit in units:
        parts = unit.name.split(".")
        for index, part in enumerate(parts):
            if part.isdigit():
                numbers[".".join(parts[:index])].add(int(part))
    for parent, given in numbers.items():
        if absent := [f"{parent}.{n}" for n in range(max(given)) if n not in given]:
            found.append(f"the file has no {listed(absent)}")
    return found


def plan_in_order(plan: Plan, sources: list[Unit], targets: list[Unit], tensors: Tensors, known: Format) -> None:
    """The file's layers one after the other into the model's; one of the two may end first, where a part of it ends."""
    heads = [unit for unit in sources if "linear.weight" in unit.slots]
    trunk = [unit for unit in sources if "linear.weight" not in unit.slots]
    count = min(len(trunk), len(targets))
    plan.pairs(trunk, targets, tensors, known.eps)
    if rest := trunk[count:]:
        if count and known.part(rest[0].name) == known.part(trunk[count - 1].name):
            plan.problems.append(f"the model has no layer for {rest[0].name} and {len(rest) - 1} more layers; {SIZE}")
        return
    behind = targets[count:]
    if heads and len(behind) == 1 and "linear.weight" in behind[0].slots:
        plan.pairs(heads, behind, tensors, known.eps)
    elif behind and not (behind[0].row and behind[0].row != targets[count - 1].row):
        plan.lacks(behind)


def plan_by_row(plan: Plan, sources: list[Unit], targets: list[Unit], tensors: Tensors, known: Format) -> None:
    """Each row of the file into the row of the same number, all rows but the model's last, its head."""
    given, wanted = _rows([(_row(unit.name), unit) for unit in sources]), _rows([(unit.row, unit) for unit in targets])
    if "" in wanted:
        return plan.problems.append("its layers are numbered rows, which the model has not; build the model from its YAML")
    for row, units in given.items():
        places = wanted.get(row, [])
        plan.pairs(units, places, tensors, known.eps)
        if len(units) > len(places):
            plan.problems.append(f"the model has no layer for {units[len(places)].name}; {SIZE}")
        elif len(places) > len(units):
            plan.lacks(places[len(units) :])
    if absent := [unit for row, units in list(wanted.items())[:-1] if row not in given for unit in units]:
        plan.lacks(absent)


def plan_by_key(plan: Plan, targets: list[Unit], state: Tensors, tensors: Tensors) -> None:
    """A state dict of the model itself, or of its other form, training or fused: their layers have the same places."""
    sources, places = ({_place(unit.name): unit for unit in units} for units in (units_of_our_file(tensors), targets))
    # a block's convolution is the first child of what the block becomes
    pairs = [
        (source, places[name])
        for place, source in sources.items()
        if (name := next((n for n in (place, f"{place}.0", place.removesuffix(".0")) if n in places), None)) is not None
    ]
    if len(pairs) == len(sources) == len({target.name for _, target in pairs}) == len(targets):
        for source, target in pairs:
            plan.pair(source, target, tensors, None)
        return
    given, wanted = ({key for key in keys if not key.endswith(COUNTER)} for keys in (tensors, state))
    if not given & wanted:
        names = ", ".join([*(known.name for known in FORMATS), OURS])
        plan.problems.append(f"its names ({listed(list(tensors), 3)}) are of no format that is known: {names}")
    elif absent := [key for key in state if key in wanted - given]:
        plan.problems.append(f"{len(absent)} tensors of the model are not in the file: {listed(absent)}")
    if more := [key for key in tensors if key in given - wanted]:
        plan.problems.append(f"{len(more)} tensors of the file are not in the model: {listed(more)}")
    for key in (key for key in tensors if key in state):
        if tensors[key].shape == state[key].shape:
            plan.values[key] = tensors[key]
            plan.used.add(key)
        else:
            shapes = tuple(tensors[key].shape), tuple(state[key].shape)
            plan.problems.append(f"{key} {shapes[0]} does not fit {key} {shapes[1]} of the model; {SIZE}")


def _place(name: str) -> str:
    """Where a layer of ours stands, in whichever form: without what only one of the two has in its path."""
    return re.sub(r"\.branches(\.conv)?$|\.conv$", "", name).replace(".gate.gate.", ".1.gate.")


def _rows(units: list[tuple[str, Unit]]) -> dict[str, list[Unit]]:
    rows: dict[str, list[Unit]] = defaultdict(list)
    for row, unit in units:
        rows[row].append(unit)
    return rows


def _row(name: str) -> str:
    return ".".join(name.split(".")[:2])

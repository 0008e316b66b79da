"""What a file and a model are compared by: their layers, in the order in which they run.

A unit is one layer with parameters of its own: a sum of branches, a convolution with its norm, a linear layer. Its slots
are the names of its tensors within such a layer, the same on both sides: `kxk.conv.weight`, `bn.running_mean`, ...
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from rep_backbones.containers import Parallel, children_of
from rep_backbones.pairs import norms_behind
from rep_backbones.weights.formats import Format

COUNTER = "num_batches_tracked"  # left out of older files, and used by no norm that has a momentum
KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "conv"),
    (nn.ConvTranspose2d, "conv"),
    (nn.Linear, "linear"),
    (nn.modules.batchnorm._BatchNorm, "bn"),
)


@dataclass
class Unit:
    """One layer of a file or model.

    Attributes:
        name: its path there.
        keys: slot -> key.
        part: of a model, the layer; its state dict has the slots as names.
        row: of a model that is a graph of rows, the path of the row that the unit lies in; else "".
    """

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    part: nn.Module = field(default_factory=nn.Identity)
    row: str = ""

    @property
    def slots(self) -> set[str]:
        """Without the counters of norms, which need not be there."""
        return {slot for slot in self.keys if not slot.endswith(COUNTER)}


def units_of_model(model: nn.Module) -> list[Unit]:
    """The layers of a model in the order in which they are registered, which in our models is that in which they run."""
    return list(_Walk(model).units(model, "", ""))


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms = norms_behind(model)
        self.taken = set(self.norms.values())  # norms that belong to the convolution in front of them

    def units(self, module: nn.Module, path: str, row: str) -> Iterator[Unit]:
        if {"i", "f"} <= vars(module).keys():
            row = row or path
        if type(module) is Parallel:
            yield Unit(path, {slot: _join(path, slot) for slot in module.state_dict()}, module, row)
        elif kind := next((kind for cls, kind in KINDS if isinstance(module, cls)), ""):
            if path not in self.taken:
                yield self._layer(module, kind, path, row)
        else:
            for name, child in children_of(module):
                yield from self.units(child, _join(path, name), row)
            inside = {name for name, _ in children_of(module)}
            if own := [key for key in module.state_dict() if key.partition(".")[0] not in inside]:
                yield Unit(path, {key: _join(path, key) for key in own}, module, row)

    def _layer(self, module: nn.Module, kind: str, path: str, row: str) -> Unit:
        paths = {kind: path}
        if path in self.norms:
            paths["bn"] = self.norms[path]
        layers = OrderedDict((name, self.model.get_submodule(where)) for name, where in paths.items())
        keys = {f"{name}.{key}": _join(paths[name], key) for name, layer in layers.items() for key in layer.state_dict()}
        return Unit(path, keys, nn.Sequential(layers), row)


def units_of_file(tensors: dict[str, Tensor], known: Format) -> tuple[list[Unit], list[str]]:
    """The layers of a file of a known format in the order in which they run, and the keys that it does not know."""
    units: dict[str, Unit] = {}
    unknown = []
    for key in tensors:
        found = known.read(key)
        if found is None:
            unknown.append(key)
            continue
        unit, slot = found
        units.setdefault(unit, Unit(unit)).keys[slot] = key
    order = _Order(units, known)
    unplaced = {name for name in units if not all(map(order.known, _ancestors(name)))}
    unknown += [key for name in unplaced for key in units[name].keys.values()]
    placed = [unit for unit in units.values() if unit.name not in unplaced]
    return sorted(placed, key=lambda unit: [order.rank(path) for path in _ancestors(unit.name)]), unknown


def units_of_our_file(tensors: dict[str, Tensor]) -> list[Unit]:
    """The layers of a state dict of a model of ours, training or fused, in its own order."""
    units: dict[str, Unit] = {}
    for key in tensors:
        unit, slot = _our_slot(key, tensors)
        units.setdefault(unit, Unit(unit)).keys[slot] = key
    return list(units.values())


def _our_slot(key: str, tensors: dict[str, Tensor]) -> tuple[str, str]:
    if match := re.fullmatch(r"(.+)\.branches\.(.+)", key) or re.fullmatch(r"(.+)\.((?:conv|bn)\.\w+)", key):
        return match[1], match[2]
    owner, _, name = key.rpartition(".")
    weight = tensors.get(f"{owner}.weight")
    if weight is None:
        return owner, name
    kind = {4: "conv", 2: "linear"}.get(weight.dim(), "bn")
    return owner, f"{kind}.{name}"


def _ancestors(name: str) -> list[str]:
    """`a.b.c` -> a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


class _Order:
    """The place of a path among its siblings: by number, or by the first order that names them all."""

    def __init__(self, units: dict[str, Unit], known: Format) -> None:
        siblings: dict[str, set[str]] = {}
        for name in units:
            for path in _ancestors(name):
                parent, _, child = path.rpartition(".")
                siblings.setdefault(parent, set()).add(child)
        self.siblings = siblings
        self.orders = {
            parent: next((order for order in known.order if children <= set(order)), None)
            for parent, children in siblings.items()
        }

    def known(self, path: str) -> bool:
        parent, _, child = path.rpartition(".")
        siblings = self.siblings[parent]
        return len(siblings) == 1 or all(name.isdigit() for name in siblings) or self.orders[parent] is not None

    def rank(self, path: str) -> int:
        parent, _, child = path.rpartition(".")
        order = self.orders[parent]
        return int(child) if child.isdigit() else order.index(child) if order else 0


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

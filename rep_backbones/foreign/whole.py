"""The model around the changed modules: it may read what only the old ones had, so it is run once more.

Each change is proved where it stands. What that can't show is a parent that asks a module for its attributes, or for a
side effect; a change that the model does not bear is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.foreign.cost import tensors_in

ROUGHLY = 1e-2  # of an output's range: far over any rounding, far under another function


class Changes:
    """The children that a model has, before and after it is changed."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {module: dict(module._modules) for module in model.modules()}

    def unbearable(self, run: Callable[[], Any], expected: list[Tensor]) -> dict[nn.Module, str]:
        """Take back the changes without which `run` gives what is expected: each old module and why."""
        after = [
            (module, name, old, module._modules.get(name))
            for module, children in self._before.items()
            for name, old in children.items()
            if old is not None and module._modules.get(name) is not old
        ]
        if not after or not _fault(run, expected):
            return {}
        for module, name, old, _ in after:
            module._modules[name] = old
        taken_back: dict[nn.Module, str] = {}
        for module, name, old, new in after:
            module._modules[name] = new
            if fault := _fault(run, expected):
                module._modules[name] = old
                taken_back[old] = fault
        return taken_back


def outputs(result: Any) -> list[Tensor]:
    """What a model gave, kept as it is now."""
    return [t.detach().clone() for t in tensors_in(result)]


def _fault(run: Callable[[], Any], expected: list[Tensor]) -> str:
    try:
        with torch.no_grad():
            got = list(tensors_in(run()))
    except Exception as error:  # whatever other people's code raises
        return f"the model fails with it merged ({type(error).__name__}: {error})"
    if [t.shape for t in got] != [t.shape for t in expected]:
        return "the model gives outputs of another shape with it merged"
    for a, b in zip(expected, got):
        if not a.numel():
            continue
        # sorted, as equal scores may change places in a list of detections
        x, y = a.double().flatten().sort().values, b.detach().double().flatten().sort().values
        if not (x - y).abs().max() <= ROUGHLY * max(float(x[-1] - x[0]), float(x.abs().max()) * 1e-3):
            return "the model computes something else with it merged"
    return ""

"""Which batch normalization follows which convolution, read from the modules' own `forward`.

The order in which a class registers its layers says nothing about the order in which it runs them, so each module that
holds convolutions is traced symbolically (torch.fx), with all of its submodules opaque.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from rep_backbones.containers import runs_in_series
from rep_backbones.rules import is_series

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # exact types


class _Opaque(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def norms_behind(model: nn.Module) -> dict[str, str]:
    """Dotted path of a Conv2d -> that of the batch normalization which alone takes its output."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if _holds_conv(module):
            found |= {_join(path, conv): _join(path, norm) for conv, norm in _pairs(module).items()}
    return found


def _holds_conv(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False  # what runs its children is the module around it
    held = [child for child in module.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    return any(isinstance(child, nn.Conv2d) for part in (module, *held) for child in part.children())


def _pairs(module: nn.Module) -> dict[str, str]:
    if runs_in_series(module):
        names = list(module._modules) if is_series(module) else []
        steps = list(zip(names, names[1:]))
    else:
        steps = _traced(module)
    return {conv: norm for conv, norm in steps if _fit(module, conv, norm)}


def _traced(module: nn.Module) -> list[tuple[str, str]]:
    """Submodules whose output goes to one other submodule and nowhere else, each called once."""
    try:
        graph = _Opaque().trace(module)
    except Exception:  # a forward that depends on its data can't be traced; its convolutions then have no known norm
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    steps: list[tuple[str, str]] = []
    for node in calls:
        users: list[Any] = list(node.users)
        if len(users) == 1 and users[0].op == "call_module" and times[str(node.target)] == 1:
            if times[str(users[0].target)] == 1:
                steps.append((str(node.target), str(users[0].target)))
    return steps


def _fit(module: nn.Module, conv: str, norm: str) -> bool:
    first, second = module.get_submodule(conv), module.get_submodule(norm)
    if not isinstance(first, nn.Conv2d) or type(second) not in NORMS:
        return False
    assert isinstance(second, NORMS)
    return second.num_features == first.out_channels and second.running_mean is not None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

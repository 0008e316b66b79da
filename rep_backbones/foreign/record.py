"""What each module of a model does when the model runs once: what it gets, and what runs inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.foreign.cost import Counting, Step, is_convolution, is_picture

# modules of torch that are not affine, so that nothing around them needs to be tried
CURVED = ("torch.nn.modules.activation", "torch.nn.modules.normalization", "torch.nn.modules.instancenorm")


@dataclass
class Seen:
    """One module in one run.

    Attributes:
        x: its only argument, a picture `(n, c, h, w)`, at its first call; None if it takes anything else, or gives it.
        calls, convs, steps: how often it was called, and how many convolutions and operations ran inside.
        curved: whether an activation or the like ran inside.
    """

    x: Tensor | None = None
    calls: int = 0
    convs: int = 0
    steps: int = 0
    curved: bool = False


def record(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Seen]:
    """Run the model by `run`, and tell of each module that was called."""
    recording = _Recording()
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recording.opened, with_kwargs=True))
        handles.append(module.register_forward_hook(recording.closed))
    try:
        with torch.no_grad(), recording:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return recording.found


class _Recording(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[nn.Module, Seen] = {}
        self._open: list[nn.Module] = []
        self._aside = False

    def opened(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append(module)
        seen = self.found.setdefault(module, Seen())
        seen.calls += 1
        if type(module).__module__ in CURVED:
            for each in self._open:
                self.found[each].curved = True
        if seen.calls == 1 and len(args) == 1 and not kwargs and is_picture(args[0]):
            self._aside = True
            seen.x = args[0][:1].detach().cpu().clone()  # it may be written over later
            self._aside = False

    def closed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.pop()
        if not is_picture(output):
            self.found[module].x = None

    def seen(self, step: Step) -> None:
        if self._aside:
            return
        for module in set(self._open):
            self.found[module].steps += 1
            self.found[module].convs += is_convolution(step.function)

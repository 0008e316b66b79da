"""What running something costs: operations, convolutions, FLOPs, and the memory that its results take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Cost:
    """Of one run: operations that compute something, convolutions among them, FLOPs, and bytes of all results."""

    steps: int
    convs: int
    flops: int
    bytes: int


def cost(run: Callable[[], Any]) -> Cost:
    """Run something and count."""
    counted = _Counted()
    with counted:
        run()
    return Cost(counted.steps, counted.convs, counted.flops, counted.bytes)


@dataclass(frozen=True)
class Step:
    """An operation that ran: what it was given, what it gave, and the tensors in that."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    made: list[Tensor]


class _Told(ABC):
    """What a dispatch mode tells. Apart from the mode: torch loads its compiler, in seconds, around a mode's own method."""

    @abstractmethod
    def seen(self, step: Step) -> None:
        """An operation that computed tensors from tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        if made and not _is_view(func) and next(tensors_in(args), None) is not None:
            self.seen(Step(func, args, kwargs or {}, result, made))
        return result


class Counting(_Told, TorchDispatchMode):
    """Calls `seen` for each operation that computes tensors from tensors; views are none."""


class _Counted(Counting):
    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # which loads Triton; only what is measured needs it

        super().__init__()
        self._flops = flop_registry  # of convolutions and matrix products
        self.steps = self.convs = self.flops = self.bytes = 0

    def seen(self, step: Step) -> None:
        self.steps += 1
        count = self._flops.get(step.function._overloadpacket)
        self.flops += count(*step.args, **step.kwargs, out_val=step.result) if count else 0
        self.bytes += sum(t.numel() * t.element_size() for t in step.made)
        if is_convolution(step.function):
            self.convs += 1
            # in float64 the CPU unfolds the input: each output pixel with all that its kernel sees, one group at a time
            out, kernel = step.made[0], step.args[1]
            self.bytes += out[:, 0].numel() * kernel[0].numel() * out.element_size()


def is_convolution(function: Any) -> bool:
    """Whether an operation that was dispatched is a convolution."""
    return function is torch.ops.aten.convolution.default


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Every floating point tensor of a nest of lists, tuples and mappings."""
    if isinstance(nest, Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, (list, tuple)):
        for each in nest:
            yield from tensors_in(each)
    elif isinstance(nest, dict):
        yield from tensors_in(list(nest.values()))


def is_picture(value: Any) -> bool:
    """Whether a value is pictures, `(n, c, h, w)`."""
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _is_view(function: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)

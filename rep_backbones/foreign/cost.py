"""What running something costs: operations, convolutions, FLOPs, and the memory that its results take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


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


class Counting(TorchDispatchMode, ABC):
    """Calls `seen` for each operation that computes tensors from tensors; views are none."""

    @abstractmethod
    def seen(self, function: Any, arguments: tuple[Any, ...], results: list[Tensor], flops: int) -> None:
        """An operation, what it was given, the tensors that it made, and the FLOPs that it took."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        if made and not _is_view(func) and next(tensors_in(args), None) is not None:
            count = flop_registry.get(func._overloadpacket)  # of convolutions and matrix products
            self.seen(func, args, made, count(*args, **(kwargs or {}), out_val=result) if count else 0)
        return result


class _Counted(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.steps = self.convs = self.flops = self.bytes = 0

    def seen(self, function: Any, arguments: tuple[Any, ...], results: list[Tensor], flops: int) -> None:
        self.steps += 1
        self.flops += flops
        self.bytes += sum(t.numel() * t.element_size() for t in results)
        if is_convolution(function):
            self.convs += 1
            # in float64 the CPU unfolds the input: each output pixel with all that its kernel sees, one group at a time
            out, kernel = results[0], arguments[1]
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

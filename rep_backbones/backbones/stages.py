"""A network as data, and the one builder of all of them.

A family's configuration lists the layers of each stage (a `Layout`); what is made of it is a classifier, a list of feature
maps, or one row of a model YAML. The stages have the same names in all three, so weights go from one form to another.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from rep_backbones.registry import near

LARGEST = 64  # multiple of a published width or depth


@dataclass(frozen=True)
class Step:
    """One layer of a stage, built as `block(c1, channels, **options)`; c1 is what the layer in front of it gives."""

    block: Callable[..., nn.Module]
    channels: int
    options: Mapping[str, Any] = field(default_factory=dict)


Layout = tuple[tuple[Step, ...], ...]  # the layers of each stage, the stem first


class Config(Protocol):
    """The numbers of one network, as its paper's table has them."""

    def layout(self, width: float, depth: float) -> Layout:
        """The network's layers with `width` times its channels and `depth` times its repeats."""


def scaled_channels(channels: float, width: float) -> int:
    """`width` times `channels`, as a multiple of 8: groups still divide it."""
    return max(8, round(channels * width / 8) * 8)


def scaled_repeats(repeats: int, depth: float) -> int:
    """`depth` times `repeats`, and at least one."""
    return max(1, round(repeats * depth))


def channels_of(layout: Layout) -> list[int]:
    """The channels that each stage gives."""
    return [steps[-1].channels for steps in layout]


def strides_of(layout: Layout) -> list[int]:
    """The stride of each stage's output on the picture."""
    inside = [math.prod(step.options.get("s", 1) for step in steps) for steps in layout]
    return [math.prod(inside[: index + 1]) for index in range(len(layout))]


def built(layout: Layout, in_chans: int) -> OrderedDict[str, nn.Module]:
    """The stages by name: `stem`, `stage1`, `stage2`, ..."""
    if type(in_chans) is not int or in_chans < 1:
        raise ValueError(f"in_chans={in_chans!r} is not accepted; give the channels of the picture, a whole number from 1")
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for index, steps in enumerate(layout):
        layers = []
        for step in steps:
            layers.append(step.block(in_chans, step.channels, **step.options))
            in_chans = step.channels
        stages[f"stage{index}" if index else "stem"] = nn.Sequential(*layers)
    return stages


class Classifier(nn.Sequential):
    """The stages, the mean over the picture, and a linear layer. `(n, in_chans, h, w)` -> `(n, num_classes)`.

    Attributes:
        strides: of each stage's output on the picture.
        channels: that each stage gives.
    """

    def __init__(self, layout: Layout, in_chans: int, num_classes: int) -> None:
        layers, channels = built(layout, in_chans), channels_of(layout)
        layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1))
        if num_classes:
            layers["head"] = nn.Linear(channels[-1], num_classes)
        super().__init__(layers)
        self.strides, self.channels = strides_of(layout), channels


class Stages(nn.Sequential):
    """The input and the output of each stage. `(n, c1, h, w)` -> a list, the input first.

    Attributes:
        strides: of each of them on the input.
        channels: of each of them.
    """

    def __init__(self, layout: Layout, in_chans: int) -> None:
        super().__init__(built(layout, in_chans))
        self.strides, self.channels = [1, *strides_of(layout)], [in_chans, *channels_of(layout)]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        outputs = [x]
        for stage in self:
            outputs.append(stage(outputs[-1]))
        return outputs


class Features(Stages):
    """The outputs of some stages. `(n, in_chans, h, w)` -> a list of `(n, channels[i], h / strides[i], w / strides[i])`.

    Attributes:
        out_indices: of these stages, 0 the stem; stages behind the last of them are not built.
        strides, channels: of these outputs.
    """

    def __init__(self, layout: Layout, in_chans: int, out_indices: Sequence[int]) -> None:
        super().__init__(layout[: max(out_indices) + 1], in_chans)
        self.out_indices = list(out_indices)
        self.strides, self.channels = ([values[i + 1] for i in out_indices] for values in (self.strides, self.channels))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        outputs = super().forward(x)
        return [outputs[index + 1] for index in self.out_indices]


class Trunk(Stages):
    """A whole trunk as one row of a model YAML, `[-1, 1, RepVGG, [a0]]`; `Index` rows take its outputs.

    Subclasses name their family's networks. As in the stock `TorchVision` row, output 0 is the input; that of stride 2**i
    is output i in all families here.

    Args:
        c1: channels of the input.
        variant: one of `variants`.
        width, depth: multiples of the published channels and repeats.

    Raises:
        ValueError: for an unknown variant, with the near ones.
    """

    variants: ClassVar[Mapping[str, Config]]

    def __init__(self, c1: int, variant: str, width: float = 1.0, depth: float = 1.0) -> None:
        if variant not in self.variants:
            known = ", ".join(self.variants)
            hint = near(variant, self.variants)
            raise ValueError(f"{type(self).__name__} has no variant {variant!r}: {hint}Accepted are {known}")
        check_multiples(width=width, depth=depth)
        super().__init__(self.variants[variant].layout(width, depth), c1)


def check_multiples(**given: float) -> None:
    """Refuse multiples that are no positive numbers, or over 64, which nobody needs and no memory holds.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
            raise ValueError(
                f"{name}={value!r} is not accepted; give a multiple of what is published, such as 0.5, up to {LARGEST}"
            )

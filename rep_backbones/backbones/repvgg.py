"""RepVGG's networks.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, tables 2 and 3; D2se of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from rep_backbones.backbones.stages import Layout, Step, Trunk, scaled_channels, scaled_repeats
from rep_backbones.blocks import RepVGGBlock
from rep_backbones.registry import register_layer

A = (2, 4, 14, 1)
B = (4, 6, 16, 1)
D = (8, 14, 24, 1)
WIDTHS = (64, 128, 256, 512)
LAST_GROUPED = 26


@dataclass(frozen=True)
class RepVGGConfig:
    """One row of table 2.

    Attributes:
        repeats: layers of stages 1 to 4.
        a, b: multiples of the widths 64, 128, 256 of stages 1 to 3, and of the 512 of stage 4.
        groups: of layers 2, 4, ... 26, counted from the first behind the stem.
        se: squeeze-and-excitation in each layer.
    """

    repeats: tuple[int, int, int, int]
    a: float
    b: float
    groups: int = 1
    se: bool = False

    def layout(self, width: float, depth: float) -> Layout:
        """The stem and four stages, each with stride 2."""
        number = 0
        stages = [(self._step(min(64.0, 64 * self.a), width, s=2, number=number),)]
        for channels, multiple, repeats in zip(WIDTHS, (self.a, self.a, self.a, self.b), self.repeats):
            steps = []
            for index in range(scaled_repeats(repeats, depth)):
                number += 1
                steps.append(self._step(channels * multiple, width, s=1 if index else 2, number=number))
            stages.append(tuple(steps))  # type: ignore[arg-type]
        return tuple(stages)

    def _step(self, channels: float, width: float, s: int, number: int) -> Step:
        grouped = number % 2 == 0 and 0 < number <= LAST_GROUPED
        options = {"s": s, "g": self.groups if grouped else 1, "se": self.se}
        return Step(RepVGGBlock, scaled_channels(channels, width), options)


@register_layer(outputs="list")
class RepVGG(Trunk):
    """RepVGG without its linear layer: A0 to B3g4, D2se."""

    variants = {
        "a0": RepVGGConfig(A, 0.75, 2.5),
        "a1": RepVGGConfig(A, 1.0, 2.5),
        "a2": RepVGGConfig(A, 1.5, 2.75),
        "b0": RepVGGConfig(B, 1.0, 2.5),
        "b1": RepVGGConfig(B, 2.0, 4.0),
        "b1g2": RepVGGConfig(B, 2.0, 4.0, groups=2),
        "b1g4": RepVGGConfig(B, 2.0, 4.0, groups=4),
        "b2": RepVGGConfig(B, 2.5, 5.0),
        "b2g2": RepVGGConfig(B, 2.5, 5.0, groups=2),
        "b2g4": RepVGGConfig(B, 2.5, 5.0, groups=4),
        "b3": RepVGGConfig(B, 3.0, 5.0),
        "b3g2": RepVGGConfig(B, 3.0, 5.0, groups=2),
        "b3g4": RepVGGConfig(B, 3.0, 5.0, groups=4),
        "d2se": RepVGGConfig(D, 2.5, 5.0, se=True),
    }

"""MobileOne's networks.

Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone", CVPR 2023, tables 2 and 3: layers of a depthwise and
a pointwise block. The paper's stages 4 and 5 have one resolution, and are one stage here as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from rep_backbones.backbones.stages import Layout, Step, Trunk, scaled_channels, scaled_repeats
from rep_backbones.blocks import MobileOneBlock
from rep_backbones.registry import register_layer

REPEATS = (2, 8, 10, 1)
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class MobileOneConfig:
    """One column of table 3.

    Attributes:
        alphas: multiples of the widths 64, 128, 256, 512 of the stages behind the stem.
        n: KxK convolutions side by side in each block behind the stem, the paper's k.
        se: squeeze-and-excitation in the second half of the third of these stages, and in the last.
    """

    alphas: tuple[float, float, float, float]
    n: int = 1
    se: bool = False

    def layout(self, width: float, depth: float) -> Layout:
        """The stem and four stages, each with stride 2."""
        last = scaled_channels(min(64.0, 64 * self.alphas[0]), width)
        stages: list[tuple[Step, ...]] = [(Step(MobileOneBlock, last, {"s": 2, "n": 1}),)]
        for number, (channels, alpha, repeats) in enumerate(zip(WIDTHS, self.alphas, REPEATS)):
            steps: list[Step] = []
            repeats = scaled_repeats(repeats, depth)
            gated = {2: repeats // 2, 3: repeats}.get(number, 0) if self.se else 0
            for index in range(repeats):
                options = {"n": self.n, "se": index >= repeats - gated}
                steps.append(Step(MobileOneBlock, last, {"s": 1 if index else 2, "g": "depthwise", **options}))
                last = scaled_channels(channels * alpha, width)
                steps.append(Step(MobileOneBlock, last, {"k": 1, **options}))
            stages.append(tuple(steps))
        return tuple(stages)


@register_layer(outputs="list")
class MobileOne(Trunk):
    """MobileOne without its linear layer: S0 to S4."""

    variants = {
        "s0": MobileOneConfig((0.75, 1.0, 1.0, 2.0), n=4),
        "s1": MobileOneConfig((1.5, 1.5, 2.0, 2.5)),
        "s2": MobileOneConfig((1.5, 2.0, 2.5, 4.0)),
        "s3": MobileOneConfig((2.0, 2.5, 3.0, 4.0)),
        "s4": MobileOneConfig((3.0, 3.5, 3.5, 4.0), se=True),
    }

"""YOLOv6 v3's trunks: EfficientRep (n, s) and CSPBep (m, l), with their pooling pyramid.

Li et al., "YOLOv6 v3.0: A Full-Scale Reloading", arXiv:2301.05586, section 2.1; the numbers are those of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rep_backbones.backbones.stages import Layout, Step, Trunk, scaled_channels, scaled_repeats
from rep_backbones.blocks import BepC3, ConvBNAct, RepVGGBlock, SimCSPSPPF, SimSPPF
from rep_backbones.registry import register_layer

REPEATS = (6, 12, 18, 6)
WIDTHS = (128, 256, 512, 1024)


@dataclass(frozen=True)
class EfficientRepConfig:
    """One size of YOLOv6.

    Attributes:
        depth: multiple of the repeats 6, 12, 18, 6 of the stages behind the stem.
        width: multiple of the stem's 64 and the stages' 128, 256, 512, 1024 channels.
        e: hidden channels of the CSP stages as a fraction of the stage's; None for stages of RepVGG blocks.
        rep: RepVGG blocks with ReLU, or plain convolutions with SiLU where False.
        pyramid: the pooling behind the last stage.
    """

    depth: float
    width: float
    pyramid: type[nn.Module]
    e: float | None = None
    rep: bool = True

    def layout(self, width: float, depth: float) -> Layout:
        """The stem and four stages, each with stride 2; the last ends in the pooling pyramid."""
        options = {} if self.rep else {"act": "SiLU"}
        layer = RepVGGBlock if self.rep else ConvBNAct
        stages: list[tuple[Step, ...]] = [(Step(layer, scaled_channels(64 * self.width, width), {"s": 2, **options}),)]
        for channels, repeats in zip(WIDTHS, REPEATS):
            c2 = scaled_channels(channels * self.width, width)
            n = scaled_repeats(scaled_repeats(repeats, self.depth), depth)
            if self.e is None:
                body = [Step(layer, c2, options)] * n
            else:
                body = [Step(BepC3, c2, {"n": n, "e": self.e, "rep": self.rep, **options})]
            stages.append((Step(layer, c2, {"s": 2, **options}), *body))
        stages[-1] = (*stages[-1], Step(self.pyramid, c2, options))
        return tuple(stages)


@register_layer(outputs="list")
class EfficientRep(Trunk):
    """YOLOv6 v3's trunk in its four sizes; m and l are the paper's CSPBep."""

    variants = {
        "n": EfficientRepConfig(0.33, 0.25, SimCSPSPPF),
        "s": EfficientRepConfig(0.33, 0.50, SimCSPSPPF),
        "m": EfficientRepConfig(0.60, 0.75, SimSPPF, e=0.667),
        "l": EfficientRepConfig(1.00, 1.00, SimSPPF, e=0.5, rep=False),
    }

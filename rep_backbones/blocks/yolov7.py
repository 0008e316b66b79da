"""YOLOv7's pyramid pooling.

Wang et al., "YOLOv7", CVPR 2023, and its published code: max poolings of 5, 9 and 13 side by side, which are three of 5 in
series, in a cross-stage partial stage. Only its convolutions and their norms fold.
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.parts import Act, activation, hidden_channels
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.containers import Concat, PoolPyramid
from rep_backbones.registry import register_layer


@register_layer
class SPPCSPC(nn.Sequential):
    """`(n, c1, h, w)` -> `(n, c2, h, w)`, SiLU.

    Args:
        k: of each max pooling in series; 5 gives the published 5, 9 and 13.
        e: hidden channels as a fraction of 2 * c2.
    """

    def __init__(self, c1: int, c2: int, k: int = 5, e: float = 0.5, act: Act = True) -> None:
        h = hidden_channels(2 * c2, e)

        def layer(given: int, out: int, size: int) -> ConvBNAct:
            return ConvBNAct(given, out, size, act=activation(act, nn.SiLU))

        deep = nn.Sequential(
            layer(c1, h, 1), layer(h, h, 3), layer(h, h, 1), PoolPyramid(k), layer(4 * h, h, 1), layer(h, h, 3)
        )
        super().__init__(Concat([deep, layer(c1, h, 1)]), layer(2 * h, c2, 1))

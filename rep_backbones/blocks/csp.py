"""The cross-stage partial stage.

Wang et al., "CSPNet", CVPRW 2020, fig. 2: half of the channels go through the stage's blocks, half past them.
Only the layers inside fold.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from rep_backbones.blocks.parts import Act, activation, conv_bn, hidden_channels
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.containers import Block, Concat, Split
from rep_backbones.registry import layer_named, register_layer


@register_layer(repeats="inside")
class CSPStage(nn.Sequential):
    """A cross-stage partial stage of n blocks. `(n, c1, h, w)` -> `(n, c2, h, w)`.

    The two 1x1 convolutions that make the halves fold to one. With `block: ResidualBlock, act: SiLU, bottleneck: 1.0,
    act_first: true` it is YOLOv5's C3.

    Args:
        n: blocks in series.
        block: the name of a registered layer that is built as `block(c, c)`.
        e: hidden channels as a fraction of c2.
        act: of the 1x1 layers and the blocks; True for ReLU in the first and the default of the second.
        options: keywords of the blocks.

    Raises:
        ValueError: for an unknown `block`.
        TypeError: for options that it does not take.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 1,
        block: str = "RepVGGBlock",
        e: float = 0.5,
        act: Act = True,
        **options: Any,
    ) -> None:
        hidden, layer = hidden_channels(c2, e), layer_named(block)
        if act is not True:
            options["act"] = act
        blocks = [layer.cls(hidden, hidden, *([1] if layer.repeats == "inside" else []), **options) for _ in range(n)]
        halves = Concat([conv_bn(c1, hidden), conv_bn(c1, hidden)])
        super().__init__(
            OrderedDict(
                halves=Block(halves, act=activation(act, nn.ReLU)),
                split=Split(nn.Sequential(*blocks)),
                out=ConvBNAct(2 * hidden, c2, 1, act=act),
            )
        )

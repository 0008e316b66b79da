"""The plain convolution that the networks of this package have between their multi-branch layers."""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.parts import Act, activation, conv_bn
from rep_backbones.containers import Block
from rep_backbones.registry import register_layer


@register_layer
class ConvBNAct(Block):
    """Convolution, BN, ReLU: one branch. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`."""

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, p: int | None = None, g: int = 1, d: int = 1, act: Act = True
    ) -> None:
        super().__init__(conv_bn(c1, c2, k, s, p, g, d), act=activation(act, nn.ReLU))

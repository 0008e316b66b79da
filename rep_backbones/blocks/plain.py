"""The plain convolution that the networks of this package have between their multi-branch layers."""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block
from rep_backbones.registry import register_layer


@register_layer
class ConvBNAct(Block):
    """Convolution, BN, ReLU: one branch. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`."""

    def __init__(
        self, c1: int, c2: int, k: Size = 3, s: Size = 1, p: Size | None = None, g: Groups = 1, d: Size = 1, act: Act = True
    ) -> None:
        super().__init__(Frame.of(c1, c2, k, s, p, g, d).branch(), act=activation(act, nn.ReLU))

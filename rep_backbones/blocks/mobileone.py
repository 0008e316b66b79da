"""MobileOne's block.

Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone", CVPR 2023, section 3.3 and fig. 3: n KxK convolutions
side by side, a 1x1 convolution and the identity, each with its own BN, are summed. They fold to one KxK convolution as
RepVGG's do. The paper's layer is two of them: depthwise (`g="depthwise"`, k=3), then pointwise (k=1, no 1x1 branch).
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation, squeeze_excite
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer


@register_layer
class MobileOneBlock(Block):
    """n KxK + 1x1 + identity, then ReLU. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    Args:
        n: KxK convolutions side by side; 4 as in MobileOne-S0.
        se: squeeze-and-excitation in front of the activation.

    Raises:
        ValueError: for an even `k`, groups that do not divide the channels, or `n` under 1.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 3,
        s: Size = 1,
        p: Size | None = None,
        g: Groups = 1,
        d: Size = 1,
        act: Act = True,
        n: int = 4,
        se: bool = False,
    ) -> None:
        if n < 1:
            raise ValueError(f"n={n}: MobileOneBlock needs at least one KxK convolution; the paper has 1 to 5")
        frame = Frame.of(c1, c2, k, s, p, g, d)
        branches: dict[str, nn.Module] = {f"kxk_{i}": frame.branch() for i in range(n)}
        if frame.k != (1, 1):
            branches["1x1"] = frame.branch(1)
        if frame.keeps_shape:
            branches["identity"] = frame.identity(nn.BatchNorm2d(c1))
        tail: dict[str, nn.Module] = {"gate": squeeze_excite(c2)} if se else {}
        super().__init__(Parallel(branches), **tail, act=activation(act, nn.ReLU))

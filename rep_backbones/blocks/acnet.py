"""ACNet's asymmetric convolution block.

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks", ICCV 2019,
section 3.2: KxK, 1xK and Kx1 convolutions, each with its own BN, are summed. They fold to one KxK convolution: kernels
scaled by gamma / sqrt(var + eps), the flat and the tall one placed on the middle row and column, biases added.
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer


@register_layer
class ACBlock(Block):
    """KxK + 1xK + Kx1, then ReLU. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    A flat or tall kernel that would be the block's own is left out, so a 1x9 block has 1x9 and 1x1.

    Raises:
        ValueError: for an even `k`, or groups that do not divide the channels.
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
    ) -> None:
        frame = Frame.of(c1, c2, k, s, p, g, d)
        branches: dict[str, nn.Module] = {"kxk": frame.branch()}
        for name, kernel in (("1xk", (1, frame.k[1])), ("kx1", (frame.k[0], 1))):
            if kernel != frame.k:
                dilation = tuple(d if k > 1 else 1 for k, d in zip(kernel, frame.d))
                branches[name] = frame.branch(kernel, dilation)  # type: ignore[arg-type]
        super().__init__(Parallel(branches), act=activation(act, nn.ReLU))

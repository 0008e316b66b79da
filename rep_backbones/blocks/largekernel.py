"""RepLKNet's large kernel beside a small one, and the depthwise pair of YOLOv10.

Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022, section 3.2: a depthwise
KxK convolution and a small one, each with its own BN, are summed. They fold to the KxK one, the small kernel at its centre.
Wang et al., "YOLOv10", NeurIPS 2024, section 3.2, has 7x7 + 3x3 with SiLU in its compact blocks (RepVGGDW).
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer


def _pair(frame: Frame, small: int) -> Parallel:
    kernel = (max(min(small, frame.k[0] - 2), 1), max(min(small, frame.k[1] - 2), 1))
    branches: dict[str, nn.Module] = {"kxk": frame.branch()}
    if kernel != frame.k:
        branches["small"] = frame.branch(kernel)
    return Parallel(branches)


@register_layer
class ReparamLargeKernelConv(Block):
    """Depthwise KxK + small, no activation unless `act` names one. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    Args:
        g: "depthwise" (default) for as many groups as the channels allow, or a number.
        small: size of the small kernel; k - 2 at most, so 1x1 beside 3x3.

    Raises:
        ValueError: for even kernels, or groups that do not divide the channels.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 31,
        s: Size = 1,
        p: Size | None = None,
        g: Groups = "depthwise",
        d: Size = 1,
        act: Act = True,
        small: int = 5,
    ) -> None:
        super().__init__(_pair(Frame.of(c1, c2, k, s, p, g, d), small), act=activation(act, nn.Identity))


@register_layer
class RepVGGDW(Block):
    """Depthwise 7x7 + 3x3, then SiLU; the arguments, shapes and errors of ReparamLargeKernelConv."""

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 7,
        s: Size = 1,
        p: Size | None = None,
        g: Groups = "depthwise",
        d: Size = 1,
        act: Act = True,
        small: int = 3,
    ) -> None:
        super().__init__(_pair(Frame.of(c1, c2, k, s, p, g, d), small), act=activation(act, nn.SiLU))

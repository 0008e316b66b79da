"""QARepVGG's block, whose fused kernels keep their accuracy in INT8.

Chu et al., "Make RepVGG Greater Again: A Quantization-aware Approach", AAAI 2024, section 3.3 and table 3 (S4): only the KxK
convolution has a BN of its own; the 1x1 convolution and the identity have none, and one BN stands behind the sum. It folds
to one KxK convolution: the sum's kernel scaled by the last BN.
YOLOv6 (Li et al., 2022) adds an average pooling of size KxK to the sum where channels and stride allow it (V2).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer


def _normed_sum(frame: Frame, average: bool) -> nn.Module:
    branches: dict[str, nn.Module] = {"kxk": frame.branch(), "1x1": nn.Sequential(frame.bare(1))}
    if frame.keeps_shape:
        branches["identity"] = frame.identity(nn.Identity())
    if average and frame.keeps_shape:
        (kh, kw), (ph, pw) = frame.k, frame.aligned(frame.k)
        branches["avg"] = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((pw, pw, ph, ph)), avg=nn.AvgPool2d((kh, kw), 1)))
    return nn.Sequential(OrderedDict(sum=Parallel(branches), bn=nn.BatchNorm2d(frame.c2)))


@register_layer
class QARepVGGBlock(Block):
    """(KxK with BN + 1x1 + identity), BN, ReLU. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

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
        super().__init__(_normed_sum(Frame.of(c1, c2, k, s, p, g, d), average=False), act=activation(act, nn.ReLU))


@register_layer
class QARepVGGBlockV2(Block):
    """QARepVGGBlock with a KxK average of the input in the sum; the same arguments, shapes and errors."""

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
        super().__init__(_normed_sum(Frame.of(c1, c2, k, s, p, g, d), average=True), act=activation(act, nn.ReLU))

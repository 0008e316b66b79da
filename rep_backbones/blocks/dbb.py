"""The Diverse Branch Block.

Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit", CVPR 2021, section 3.3 and fig. 1:
KxK, 1x1, 1x1 - KxK and 1x1 - average pooling, each convolution with its own BN, are summed. They fold to one KxK convolution
by the paper's six transforms: BN (I), sum (II), series (III), concatenation (IV, for groups), average pooling (V) and larger
kernels (VI). The padding stands behind the inner BN and is filled with what it makes of zero, so the series is exact.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rep_backbones.affine import Pair
from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation, conv_bn
from rep_backbones.containers import Block, PaddedBatchNorm2d, Parallel
from rep_backbones.registry import register_layer


@register_layer
class DiverseBranchBlock(Block):
    """KxK + 1x1 + 1x1-KxK + 1x1-average, then ReLU. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    The 1x1 in front of the KxK starts as the identity. Depthwise (`g` equal to `c2`), as published, has no 1x1 branch, no
    1x1 in front of the average, and `2 * c1` channels between 1x1 and KxK. With `d` over 1 there is no average, whose fold
    would not be a dilated kernel; with `k=1` there is neither average nor KxK behind a 1x1.

    Args:
        c: channels between 1x1 and KxK, `c1` by default.

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
        c: int | None = None,
    ) -> None:
        frame = Frame.of(c1, c2, k, s, p, g, d)
        depthwise = frame.g == c2
        branches: dict[str, nn.Module] = {"kxk": frame.branch()}
        frame.aligned((1, 1))  # refuses even kernels, with and without the 1x1 branch
        if not depthwise:
            branches["1x1"] = frame.branch(1)
        if frame.k != (1, 1):
            branches["1x1_kxk"] = _deep(frame, c or (2 * c1 if depthwise else c1))
        if frame.k != (1, 1) and frame.d == (1, 1):
            branches["1x1_avg"] = _average(frame, pointwise=not depthwise)
        super().__init__(Parallel(branches), act=activation(act, nn.ReLU))


def _deep(frame: Frame, inner: int) -> nn.Module:
    first: nn.Module = nn.Conv2d(frame.c1, inner, 1, groups=frame.g, bias=False)
    if inner == frame.c1:
        nn.init.zeros_(first.weight)  # type: ignore[arg-type]
        first = Parallel({"conv": first, "identity": nn.Identity()})
    layers = OrderedDict(first=first, padded=PaddedBatchNorm2d(inner, frame.p))
    deep = conv_bn(inner, frame.c2, frame.k, frame.s, 0, frame.g, frame.d)
    return nn.Sequential(OrderedDict(layers, **dict(deep.named_children())))


def _average(frame: Frame, pointwise: bool) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    outside: Pair = frame.p
    if pointwise:
        layers["first"] = nn.Conv2d(frame.c1, frame.c2, 1, groups=frame.g, bias=False)
        layers["padded"] = PaddedBatchNorm2d(frame.c2, frame.p)
        outside = (0, 0)
    elif frame.c1 != frame.c2:
        layers["first"] = nn.Conv2d(frame.c1, frame.c2, 1, groups=frame.g, bias=False)
    if any(outside):
        layers["pad"] = nn.ZeroPad2d((outside[1], outside[1], outside[0], outside[0]))  # average pooling pads k / 2 at most
    layers["avg"] = nn.AvgPool2d(frame.k, frame.s)
    layers["bn"] = nn.BatchNorm2d(frame.c2)
    return nn.Sequential(layers)

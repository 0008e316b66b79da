"""Residual blocks, plain and weighted.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, fig. 2 and 5; Redmon and Farhadi, "YOLOv3", 2018,
table 1; weighted: H(x) = alpha F(x) + beta x with learned alpha and beta. What is affine is absorbed: with one convolution
in F the whole sum folds to one convolution; with more, alpha (and with a projection beta) folds into the last one, unless
an activation stands behind it, and the identity stays an addition.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation, conv_bn, hidden_channels
from rep_backbones.containers import Block, Parallel, Residual, Scale
from rep_backbones.registry import register_layer


def _convolutions(frame: Frame, n: int, bottleneck: float | None) -> list[nn.Sequential]:
    """The convolutions of F with their norms, the stride on the first k x k."""
    if n < 1 or (bottleneck is not None and n < 2):
        least = "two convolutions with a bottleneck" if n == 1 else "one convolution"
        raise ValueError(f"n={n}: a residual block needs at least {least}")
    c1, c2, (k, s, g, d) = frame.c1, frame.c2, (frame.k, frame.s, frame.g, frame.d)
    if bottleneck is None:
        inner = Frame.of(c2, c2, k, 1, None, g, d)
        return [frame.branch(), *(inner.branch() for _ in range(n - 1))]
    h = hidden_channels(c2, bottleneck)
    narrow = [Frame.of(h, c2 if n == 2 else h, k, 1 if i else s, None, g, d).branch() for i in range(max(n - 2, 1))]
    return [conv_bn(c1, h), *narrow, *([conv_bn(h, c2)] if n > 2 else [])]


def _residual(
    frame: Frame, convolutions: list[nn.Sequential], act: Act, act_first: bool, scales: tuple[Scale, Scale] | None = None
) -> OrderedDict[str, nn.Module]:
    """The sum of body and shortcut, each with its scale behind it, and the activation; affine where F is one convolution."""
    body_scale, shortcut_scale = ([scales[0]], [scales[1]]) if scales else ([], [])
    shortcut: list[nn.Module] = [frame.branch(1)] if not frame.keeps_shape else [frame.identity(nn.Identity())]
    past = nn.Sequential(*shortcut, *shortcut_scale)
    *inner, final = convolutions
    if not inner and not act_first:
        total: nn.Module = Parallel({"body": nn.Sequential(final, *body_scale), "shortcut": past})
        return OrderedDict(sum=total, act=activation(act, nn.ReLU))
    layers = [Block(conv, act=activation(act, nn.ReLU)) for conv in (convolutions if act_first else inner)]
    last = body_scale if act_first else [Block(nn.Sequential(final, *body_scale))]
    total = Residual(nn.Sequential(*layers, *last), past if frame.keeps_shape else Block(past))
    return OrderedDict(sum=total) if act_first else OrderedDict(sum=total, act=activation(act, nn.ReLU))


@register_layer
class ResidualBlock(nn.Sequential):
    """`act(F(x) + x)` with n convolutions in F; a 1x1 projection where stride or channels change.
    `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    Args:
        act: between the convolutions and behind the sum, ReLU by default.
        n: convolutions in F; with 1 the block folds to one convolution.
        bottleneck: channels inside as a fraction of c2: F is then a 1x1, the k x k and, for n over 2, a 1x1 convolution.
            ResNet-50 has `n: 3, bottleneck: 0.25`, YOLOv5 `bottleneck: 1.0`.
        act_first: an activation in front of the sum instead of behind it, as in Darknet.

    Raises:
        ValueError: for an even `k`, groups that do not divide the channels, or too small an `n` or `bottleneck`.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 3,
        s: Size = 1,
        g: Groups = 1,
        d: Size = 1,
        act: Act = True,
        n: int = 2,
        bottleneck: float | None = None,
        act_first: bool = False,
    ) -> None:
        frame = Frame.of(c1, c2, k, s, None, g, d)
        super().__init__(_residual(frame, _convolutions(frame, n, bottleneck), act, act_first))


@register_layer
class WeightedResidualBlock(nn.Sequential):
    """`act(alpha F(x) + beta x)` with learned alpha and beta, both 1 at the start; otherwise as ResidualBlock.

    Args:
        per_channel: an alpha and a beta for each channel instead of one for all.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 3,
        s: Size = 1,
        g: Groups = 1,
        d: Size = 1,
        act: Act = True,
        n: int = 2,
        per_channel: bool = False,
        bottleneck: float | None = None,
        act_first: bool = False,
    ) -> None:
        frame, scales = Frame.of(c1, c2, k, s, None, g, d), (Scale(c2, per_channel), Scale(c2, per_channel))
        super().__init__(_residual(frame, _convolutions(frame, n, bottleneck), act, act_first, scales))

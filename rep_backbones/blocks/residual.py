"""Residual blocks, plain and weighted, and the cross-stage partial stage.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, fig. 2; weighted: H(x) = alpha F(x) + beta x with
learned alpha and beta. What is affine is absorbed: with one convolution in F the whole sum folds to one convolution; with
more, alpha (and with a projection beta) folds into the last one, and the identity stays an addition.
Wang et al., "CSPNet", CVPRW 2020, fig. 2: half of the channels go through the stage's blocks, half past them.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation, conv_bn, hidden_channels
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.containers import Block, Concat, Parallel, Residual, Scale, Split
from rep_backbones.registry import layer_named, register_layer


def _residual(frame: Frame, n: int, act: Act, body_scale: list[nn.Module], shortcut_scale: list[nn.Module]) -> nn.Module:
    """The sum of body and shortcut, each with its scale behind it; affine where n is 1."""
    if n < 1:
        raise ValueError(f"n={n}: a residual block needs at least one convolution")
    shortcut: list[nn.Module] = [frame.branch(1)] if not frame.keeps_shape else [frame.identity(nn.Identity())]
    shortcut += shortcut_scale
    if n == 1:
        return Parallel({"body": nn.Sequential(frame.branch(), *body_scale), "shortcut": nn.Sequential(*shortcut)})
    c2, k, d = frame.c2, frame.k, frame.d
    first = Block(frame.branch(), act=activation(act, nn.ReLU))
    inner = Frame.of(c2, c2, k, 1, None, frame.g, d)
    middle = [Block(inner.branch(), act=activation(act, nn.ReLU)) for _ in range(n - 2)]
    last = Block(nn.Sequential(inner.branch(), *body_scale))
    past: nn.Module = Block(nn.Sequential(*shortcut)) if not frame.keeps_shape else nn.Sequential(*shortcut)
    return Residual(nn.Sequential(first, *middle, last), past)


@register_layer
class ResidualBlock(nn.Sequential):
    """`act(F(x) + x)` with n convolutions in F; a 1x1 projection where stride or channels change.
    `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    Args:
        act: between the convolutions and behind the sum, ReLU by default.
        n: convolutions in F; with 1 the block folds to one convolution.

    Raises:
        ValueError: for an even `k`, groups that do not divide the channels, or `n` under 1.
    """

    def __init__(
        self, c1: int, c2: int, k: Size = 3, s: Size = 1, g: Groups = 1, d: Size = 1, act: Act = True, n: int = 2
    ) -> None:
        total = _residual(Frame.of(c1, c2, k, s, None, g, d), n, act, [], [])
        super().__init__(OrderedDict(sum=total, act=activation(act, nn.ReLU)))


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
    ) -> None:
        alpha, beta = Scale(c2, per_channel), Scale(c2, per_channel)
        total = _residual(Frame.of(c1, c2, k, s, None, g, d), n, act, [alpha], [beta])
        super().__init__(OrderedDict(sum=total, act=activation(act, nn.ReLU)))


@register_layer(repeats="inside")
class CSPStage(nn.Sequential):
    """A cross-stage partial stage of n blocks. `(n, c1, h, w)` -> `(n, c2, h, w)`.

    The two 1x1 convolutions that make the halves fold to one.

    Args:
        n: blocks in series.
        block: the name of a registered layer that is built as `block(c, c)`.
        e: hidden channels as a fraction of c2.
        act: of the 1x1 layers, ReLU by default.

    Raises:
        ValueError: for an unknown `block`.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, block: str = "RepVGGBlock", e: float = 0.5, act: Act = True) -> None:
        hidden, layer = hidden_channels(c2, e), layer_named(block)
        blocks = [layer.cls(hidden, hidden, *([1] if layer.repeats == "inside" else [])) for _ in range(n)]
        halves = Concat([conv_bn(c1, hidden), conv_bn(c1, hidden)])
        super().__init__(
            OrderedDict(
                halves=Block(halves, act=activation(act, nn.ReLU)),
                split=Split(nn.Sequential(*blocks)),
                out=ConvBNAct(2 * hidden, c2, 1, act=act),
            )
        )

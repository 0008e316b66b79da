"""RepVGG's block and YOLOv7's planned form of it.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.3: a KxK convolution, a 1x1 convolution
and the identity, each with its own BN, are summed. They fold to one KxK convolution: kernels scaled by gamma / sqrt(var +
eps), the 1x1 and the identity placed at the centre tap, biases added.
Wang et al., "YOLOv7", CVPR 2023, section 4.1: no identity where the layer stands behind a residual or a concatenation
(RepConvN).
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation, squeeze_excite
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer


def _branches(frame: Frame, identity: bool) -> Parallel:
    """KxK + 1x1 (+ identity BN where stride and channels allow it)."""
    branches: dict[str, nn.Module] = {"kxk": frame.branch(), "1x1": frame.branch(1)}
    if identity and frame.keeps_shape:
        branches["identity"] = frame.identity(nn.BatchNorm2d(frame.c1))
    return Parallel(branches)


@register_layer
class RepVGGBlock(Block):
    """RepVGG's layer with ReLU; `se=True` puts squeeze-and-excitation in front of it. `(n, c1, h, w)` ->
    `(n, c2, h / s, w / s)`.

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
        se: bool = False,
    ) -> None:
        tail: dict[str, nn.Module] = {"gate": squeeze_excite(c2)} if se else {}
        super().__init__(_branches(Frame.of(c1, c2, k, s, p, g, d), identity=True), **tail, act=activation(act, nn.ReLU))


@register_layer
class RepConv(Block):
    """YOLOv7's layer with SiLU; the arguments, shapes and errors of RepVGGBlock without `se`."""

    def __init__(
        self, c1: int, c2: int, k: Size = 3, s: Size = 1, p: Size | None = None, g: Groups = 1, d: Size = 1, act: Act = True
    ) -> None:
        super().__init__(_branches(Frame.of(c1, c2, k, s, p, g, d), identity=True), act=activation(act, nn.SiLU))


@register_layer
class RepConvN(Block):
    """RepConv without the identity, for layers behind a residual or a concatenation."""

    def __init__(
        self, c1: int, c2: int, k: Size = 3, s: Size = 1, p: Size | None = None, g: Groups = 1, d: Size = 1, act: Act = True
    ) -> None:
        super().__init__(_branches(Frame.of(c1, c2, k, s, p, g, d), identity=False), act=activation(act, nn.SiLU))

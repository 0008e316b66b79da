"""The stages of YOLOv6: BottleRep, BepC3 and the two poolings of its trunks.

Li et al., "YOLOv6 v3.0: A Full-Scale Reloading", 2023, section 2.1, and Weng et al., "EfficientRep", 2023: stages of RepVGG
blocks (n, s), and CSP stages of them (m, l), which train with conv + SiLU in the l model (`rep: false`).
Everything here is a composition of containers; only the layers inside fold.
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.parts import Act, hidden_channels
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.blocks.repvgg import RepVGGBlock
from rep_backbones.containers import Concat, PoolPyramid, Residual, Scale
from rep_backbones.registry import register_layer


def _layer(c1: int, c2: int, act: Act, rep: bool) -> nn.Module:
    return RepVGGBlock(c1, c2, act=act) if rep else ConvBNAct(c1, c2, 3, act=act)


@register_layer
class BottleRep(nn.Sequential):
    """Two layers and `alpha * x` with a learned alpha where c1 == c2. `(n, c1, h, w)` -> `(n, c2, h, w)`.

    Args:
        weight: False for a shortcut without alpha.
        act: of both layers, ReLU by default.
        rep: RepVGG blocks, or plain convolutions where False.
    """

    def __init__(self, c1: int, c2: int, weight: bool = True, act: Act = True, rep: bool = True) -> None:
        body = nn.Sequential(_layer(c1, c2, act, rep), _layer(c2, c2, act, rep))
        shortcut: nn.Module = Scale(c2) if weight else nn.Identity()
        super().__init__(Residual(body, shortcut) if c1 == c2 else body)


@register_layer(repeats="inside")
class BepC3(nn.Sequential):
    """A cross-stage partial stage of max(n // 2, 1) BottleRep. `(n, c1, h, w)` -> `(n, c2, h, w)`.

    Args:
        n: repeats as YOLOv6 counts them, two layers each.
        e: hidden channels as a fraction of c2.
        act: of every layer, ReLU by default.
        rep: RepVGG blocks inside, or plain convolutions where False.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, e: float = 0.5, act: Act = True, rep: bool = True) -> None:
        hidden = hidden_channels(c2, e)
        stage = nn.Sequential(*(BottleRep(hidden, hidden, act=act, rep=rep) for _ in range(max(n // 2, 1))))
        deep = nn.Sequential(ConvBNAct(c1, hidden, 1, act=act), stage)
        super().__init__(Concat([deep, ConvBNAct(c1, hidden, 1, act=act)]), ConvBNAct(2 * hidden, c2, 1, act=act))


@register_layer
class SimSPPF(nn.Sequential):
    """A pyramid of three k x k max poolings between two 1x1 layers. `(n, c1, h, w)` -> `(n, c2, h, w)`."""

    def __init__(self, c1: int, c2: int, k: int = 5, act: Act = True) -> None:
        hidden = c1 // 2
        super().__init__(ConvBNAct(c1, hidden, 1, act=act), PoolPyramid(k), ConvBNAct(4 * hidden, c2, 1, act=act))


@register_layer
class SimCSPSPPF(nn.Sequential):
    """SimSPPF as a cross-stage partial stage. `(n, c1, h, w)` -> `(n, c2, h, w)`; `e`: hidden channels as a fraction of
    c2.
    """

    def __init__(self, c1: int, c2: int, k: int = 5, e: float = 0.5, act: Act = True) -> None:
        h = hidden_channels(c2, e)
        deep = nn.Sequential(
            ConvBNAct(c1, h, 1, act=act),
            ConvBNAct(h, h, 3, act=act),
            ConvBNAct(h, h, 1, act=act),
            PoolPyramid(k),
            ConvBNAct(4 * h, h, 1, act=act),
            ConvBNAct(h, h, 3, act=act),
        )
        super().__init__(Concat([ConvBNAct(c1, h, 1, act=act), deep]), ConvBNAct(2 * h, c2, 1, act=act))

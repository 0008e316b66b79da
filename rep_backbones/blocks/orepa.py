"""OREPA: branches that cost one convolution in training too.

Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, sections 3.2 and 3.3 and fig. 4: norms inside the branches
become learned scales per channel, one BN stands behind the sum, and the branches are folded inside `forward`. They are KxK,
1x1 - average, 1x1 - frequency prior, 1x1, 1x1 - KxK and a depthwise separable convolution. It folds to one KxK convolution:
the online kernel scaled by the BN.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block, Filter, Parallel, Scale
from rep_backbones.online import Online
from rep_backbones.registry import register_layer

EXPANSION = 8  # channels per input channel inside the depthwise separable branch


def _prior(channels: int, k: tuple[int, int]) -> torch.Tensor:
    """Cosines of rising frequency, along the height for the first half of the channels, then along the width."""
    half = channels // 2
    rows, columns = (torch.arange(n, dtype=torch.float64).add(0.5).mul(math.pi / n) for n in k)
    kernel = torch.empty(channels, 1, *k, dtype=torch.float64)
    for i in range(channels):
        wave = (rows * (i + 1)).cos()[:, None] if i < half else (columns * (i + 1 - half)).cos()[None, :]
        kernel[i, 0] = wave.expand(*k)
    return kernel.to(torch.get_default_dtype())


def _branches(frame: Frame) -> dict[str, nn.Module]:
    c1, c2, g = frame.c1, frame.c2, frame.g

    def scaled(value: float, *layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers, Scale(c2, per_channel=True, value=value))

    def pointwise(out: int = c2) -> nn.Conv2d:
        return nn.Conv2d(c1, out, 1, groups=g, bias=False)

    def spatial(given: int, out: int, groups: int) -> nn.Conv2d:
        return nn.Conv2d(given, out, frame.k, frame.s, frame.p, frame.d, groups, bias=False)

    branches: dict[str, nn.Module] = {
        "kxk": nn.Sequential(OrderedDict(conv=spatial(c1, c2, g), scale=Scale(c2, per_channel=True, value=0.25)))
    }
    if frame.k == (1, 1):
        return branches
    (ph, pw), plain = frame.p, frame.d == (1, 1)
    frame.aligned((1, 1))  # refuses even kernels
    if plain:  # neither of the two has a dilated form
        sampled = nn.AvgPool2d(1, frame.s)
        pad = nn.ZeroPad2d((pw, pw, ph, ph))
        branches["1x1_avg"] = scaled(0.25, pointwise(), pad, nn.AvgPool2d(frame.k, frame.s))
        branches["1x1_prior"] = scaled(0.0, pointwise(), Filter(_prior(c2, frame.k), frame.p), sampled)
    branches["1x1"] = scaled(0.5, nn.Sequential(frame.bare(1)))
    first = Parallel({"conv": pointwise(c1), "identity": nn.Identity()})
    nn.init.zeros_(first.get_submodule("conv").weight)  # type: ignore[arg-type]
    branches["1x1_kxk"] = scaled(0.5, first, spatial(c1, c2, g))
    separable = nn.Conv2d(c1 * EXPANSION, c2, 1, groups=g, bias=False)
    branches["separable"] = scaled(0.5, spatial(c1, c1 * EXPANSION, c1), separable)
    return branches


@register_layer
class OREPABlock(Block):
    """One convolution whose kernel is folded from six branches in each forward, BN, ReLU.
    `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

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
        online = Online(Parallel(_branches(Frame.of(c1, c2, k, s, p, g, d))))
        super().__init__(nn.Sequential(OrderedDict(sum=online, bn=nn.BatchNorm2d(c2))), act=activation(act, nn.ReLU))

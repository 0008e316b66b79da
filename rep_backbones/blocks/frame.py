"""The convolution that a block stands for, from which its branches are made."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from rep_backbones.affine import Pair, pair
from rep_backbones.blocks.parts import Groups, Size, conv, conv_bn, same_padding


@dataclass(frozen=True)
class Frame:
    """The convolution that a block stands for; its branches are made from it, so that all of them align with it.

    Attributes:
        c1, c2: channels.
        k, s, p, d: kernel size, stride, padding and dilation, (height, width).
        g: groups.
    """

    c1: int
    c2: int
    k: Pair
    s: Pair
    p: Pair
    g: int
    d: Pair

    @staticmethod
    def of(c1: int, c2: int, k: Size, s: Size, p: Size | None, g: Groups, d: Size) -> Frame:
        """The frame of a block's arguments.

        Raises:
            ValueError: for sizes that are no whole numbers or too small, and groups that do not divide the channels.
        """
        least = {"c1": (c1, 1), "c2": (c2, 1), "k": (k, 1), "s": (s, 1), "d": (d, 1), "p": (0 if p is None else p, 0)}
        for name, (value, smallest) in least.items():
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if any(type(n) is not int or n < smallest for n in numbers):
                raise ValueError(f"{name}={value!r} is not accepted; give a whole number from {smallest}, or a pair of them")
        return Frame(c1, c2, pair(k), pair(s), same_padding(k, d, p), group_count(g, c1, c2), pair(d))

    def branch(self, k: Size | None = None, d: Size | None = None, c1: int | None = None) -> nn.Sequential:
        """Convolution and norm with this frame's stride, channels and groups, and another kernel centred on its own."""
        k, d = self._size(k, d)
        return conv_bn(c1 or self.c1, self.c2, k, self.s, self.aligned(k, d), self.g, d)

    def bare(self, k: Size | None = None, d: Size | None = None) -> OrderedDict[str, nn.Module]:
        """The layers of `branch` without the norm."""
        k, d = self._size(k, d)
        return conv(self.c1, self.c2, k, self.s, self.aligned(k, d), self.g, d)

    def identity(self, module: nn.Module) -> nn.Module:
        """`module`, BN or Identity, where pixels pass as they are; cropped where this frame does not pad enough."""
        padding = self.aligned((1, 1), (1, 1))
        if padding == (0, 0):
            return module
        return nn.Sequential(OrderedDict(crop=nn.ZeroPad2d((padding[1], padding[1], padding[0], padding[0])), norm=module))

    @property
    def keeps_shape(self) -> bool:
        """Whether channels and stride allow an identity beside it."""
        return self.c1 == self.c2 and self.s == (1, 1)

    def aligned(self, k: Pair, d: Pair = (1, 1)) -> Pair:
        """The padding that centres a kernel of size `k` and dilation `d` on this one; negative where it must crop.

        Raises:
            ValueError: where the two have no common centre.
        """
        larger = [D * (K - 1) - e * (n - 1) for K, D, n, e in zip(self.k, self.d, k, d)]
        if any(n % 2 == 0 and n != m for n, m in zip(self.k, k)) or any(size % 2 for size in larger):
            given = f"{self.k[0]}x{self.k[1]}" if self.k[0] != self.k[1] else str(self.k[0])
            raise ValueError(
                f"k={given}: a {k[0]}x{k[1]} branch can't be aligned with an even kernel; accepted are odd kernel sizes, "
                "such as 3"
            )
        return self.p[0] - larger[0] // 2, self.p[1] - larger[1] // 2

    def _size(self, k: Size | None, d: Size | None) -> tuple[Pair, Pair]:
        return self.k if k is None else pair(k), (self.d if k is None else (1, 1)) if d is None else pair(d)


def group_count(g: Groups, c1: int, c2: int) -> int:
    """`g`, or for "depthwise" as many groups as both channel counts allow.

    Raises:
        ValueError: for another word, or a number that does not divide both channel counts.
    """
    if isinstance(g, str):
        if g != "depthwise":
            raise ValueError(f"g={g!r}; accepted are a number of groups or 'depthwise'")
        return math.gcd(c1, c2)
    if g < 1 or c1 % g or c2 % g:
        raise ValueError(f"g={g} groups must divide c1={c1} and c2={c2}; accepted are divisors of both, or 'depthwise'")
    return g

"""The parts that several blocks are declared with."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from rep_backbones.affine import Pair, pair
from rep_backbones.containers import Gate, Subsample

Act = bool | str | nn.Module | type[nn.Module]
Size = int | tuple[int, int]
Groups = int | str


def activation(act: Act, default: type[nn.Module]) -> nn.Module:
    """The activation that `act` names: True the block's default, False none, a torch.nn class or its name, or a module.

    Raises:
        ValueError: for a name that torch.nn does not have.
        TypeError: for anything else.
    """
    if act is True:
        return default()
    if act is False or act is None:
        return nn.Identity()
    if isinstance(act, nn.Module):
        return copy.deepcopy(act)
    if isinstance(act, str):
        found = getattr(nn, act.removeprefix("nn."), None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(
                f"act={act!r} is not the name of a torch.nn class; accepted are True, False, a name such as 'ReLU' or "
                "'SiLU', or a module"
            )
        return found()
    if isinstance(act, type) and issubclass(act, nn.Module):
        return act()
    raise TypeError(
        f"act={act!r} of type {type(act).__name__}; accepted are True, False, a torch.nn class or its name, or a module"
    )


def same_padding(k: Size, d: Size = 1, p: Size | None = None) -> Pair:
    """`p`, or the padding that keeps the size at stride 1: `d * (k - 1) // 2` per axis."""
    if p is not None:
        return pair(p)
    (kh, kw), (dh, dw) = pair(k), pair(d)
    return dh * (kh - 1) // 2, dw * (kw - 1) // 2


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


def conv_bn(c1: int, c2: int, k: Size = 1, s: Size = 1, p: Size | None = None, g: int = 1, d: Size = 1) -> nn.Sequential:
    """Convolution without bias and batch normalization, `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`; negative `p` crops."""
    layers = conv(c1, c2, k, s, p, g, d)
    layers["bn"] = nn.BatchNorm2d(c2)
    return nn.Sequential(layers)


def conv(
    c1: int, c2: int, k: Size = 1, s: Size = 1, p: Size | None = None, g: int = 1, d: Size = 1
) -> OrderedDict[str, nn.Module]:
    """The layers of one convolution without bias: what crops or subsamples in front of it stands apart."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    padding, stride = same_padding(k, d, p), pair(s)
    if min(padding) < 0:
        layers["crop"] = cropped(padding)
        padding = (max(padding[0], 0), max(padding[1], 0))
    if pair(k) == (1, 1) and stride != (1, 1) and padding == (0, 0):
        layers["subsample"] = Subsample(s)  # a strided 1x1 on the CPU can crash torch's backward: see Subsample
        stride = (1, 1)
    layers["conv"] = nn.Conv2d(c1, c2, k, stride, padding, d, g, bias=False)
    return layers


def cropped(padding: Pair) -> nn.ZeroPad2d:
    """Cuts what a negative padding takes away at each side."""
    ph, pw = min(padding[0], 0), min(padding[1], 0)
    return nn.ZeroPad2d((pw, pw, ph, ph))


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
            ValueError: for groups that do not divide the channels.
        """
        return Frame(c1, c2, pair(k), pair(s), same_padding(k, d, p), group_count(g, c1, c2), pair(d))

    def branch(self, k: Size | None = None, d: Size | None = None, c1: int | None = None) -> nn.Sequential:
        """Convolution and norm with this frame's stride, channels and groups, and another kernel centred on its own."""
        k, d = self._kernel(k, d)
        return conv_bn(c1 or self.c1, self.c2, k, self.s, self.aligned(k, d), self.g, d)

    def bare(self, k: Size | None = None, d: Size | None = None) -> OrderedDict[str, nn.Module]:
        """The layers of `branch` without the norm."""
        k, d = self._kernel(k, d)
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

    def _kernel(self, k: Size | None, d: Size | None) -> tuple[Pair, Pair]:
        return self.k if k is None else pair(k), (self.d if k is None else (1, 1)) if d is None else pair(d)


def squeeze_excite(c: int, reduction: int = 16) -> Gate:
    """Squeeze-and-excitation (Hu et al., CVPR 2018) as RepVGG places it: between the sum and the activation."""
    hidden = max(1, c // reduction)
    return Gate(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, c, 1), nn.Sigmoid())
    )

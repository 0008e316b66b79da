"""Blocks as other people write them, without a rule: AFFINE ones become one convolution, BENT ones must not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

C = 4


def conv_bn(k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(C))


class Two(nn.Module):
    """A 3x3 and a 1x1 convolution, and what a subclass makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn()
        self.b = conv_bn(1)
        self.act = nn.SiLU()


class PlusEquals(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y += x
        return self.act(y)


class InPlaceResultUnused(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.add_(self.b(x)).mul_(0.5)
        return y


class TorchAdd(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.a(x), self.b(x), alpha=0.3)


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x), 2 * self.b(x)), dim=1)


class Slices(nn.Module):
    """Two groups of channels, each with its own convolution: a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C // 2, 3, 3, padding=1), nn.Conv2d(C // 2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x[:, : C // 2]), self.b(x[:, C // 2 :])], 1)


class ChunkList(Slices):
    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2, 1))
        return torch.cat([layer(part) for layer, part in zip((self.a, self.b), parts)], 1)


class Constants(Two):
    """Constants that the forward makes, as big as the sizes that it asks for."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        shift = (torch.arange(c) / 4).reshape(1, c, 1, 1).expand(n, c, h, w)
        return self.a(x) + self.b(x) + shift + torch.ones(n, 1, h, w) * 0.25


class PadByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1, 1, 1))
        return self.a(y) + self.b(y)[:, :, 1:-1, 1:-1]


class FunctionalTail(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.a(x) + self.b(x), 0.2, inplace=True)


class TailWithoutAModule(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return y * torch.tanh(F.softplus(y))


class DropPath(nn.Module):
    """Stochastic depth: nothing in eval."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.9) / 0.9


class Stochastic(Two):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath()
        self.dropout = nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.drop(self.a(x)) + self.dropout(self.b(x)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = TorchAdd(), InPlaceResultUnused()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x) - self.two(x))


class LearnedMix(Two):
    """Branches weighted by a softmax of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.3, -0.4, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        w = self.alpha.softmax(0)
        return w[0] * self.a(x) + w[1] * self.b(x) + w[2] * x


class KernelInForward(nn.Module):
    """A kernel that is put together from parameters in each forward, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.w1 = nn.Parameter(torch.randn(C, C, 3, 3)), nn.Parameter(torch.randn(C, C, 1, 1))
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.w3 + F.pad(self.w1, [1, 1, 1, 1]), padding=1)).relu()


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(C, C, k, padding=k // 2) for k in (1, 3, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(C) for _ in self.convs])

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for conv, norm in zip(self.convs, self.norms):
            total = total + norm(conv(x))
        return total.clamp(min=0)


class Dilated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=C, stride=2)
        self.b = nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=C, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Cross(nn.Module):
    """ACNet's three kernels, and an average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.row = nn.Conv2d(C, C, (1, 3), padding=(0, 1), bias=False)
        self.column = nn.Conv2d(C, C, (3, 1), padding=(1, 0))
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.row(x) + self.column(x) + self.pool(x)


class LargeKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(C, C, 31, padding=15, groups=C)
        self.small = nn.Conv2d(C, C, 5, padding=2, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)


class Attention(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class WithAttention(Two):
    def __init__(self) -> None:
        super().__init__()
        self.se = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.a(x) + self.b(x)))


class Tokens(nn.Module):
    """A linear layer on the channels, as in a transformer, and a depthwise convolution in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(C, C), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + self.more(x)


class SpaceToDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4 * C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.bn(self.conv(torch.cat(parts, 1)))


class AsksForSizes(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4 and x.shape[1] == C
        if x.shape[2] > 0 and len(x.shape) == 4:
            return self.a(x) + self.b(x)
        return x


class LooksAtNumbers(Two):
    """No trace of this one: it checks its input."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("NaN")
        return self.act(self.a(x) + self.b(x))


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3, padding=1))
        self.b = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


# a block, and the convolutions that are left of it
AFFINE: list[tuple[Callable[[], nn.Module], int]] = [
    (PlusEquals, 1),
    (InPlaceResultUnused, 1),
    (TorchAdd, 1),
    (Cat, 1),
    (Slices, 1),
    (ChunkList, 1),
    (Constants, 1),
    (PadByHand, 1),
    (FunctionalTail, 1),
    (TailWithoutAModule, 1),
    (Stochastic, 1),
    (Nested, 1),
    (LearnedMix, 1),
    (KernelInForward, 1),
    (Loop, 1),
    (Dilated, 1),
    (Cross, 1),
    (LargeKernel, 1),
    (WithAttention, 2),
    (Tokens, 1),
    (SpaceToDepth, 1),
    (AsksForSizes, 1),
    (LooksAtNumbers, 1),
    (WeightNormed, 1),
]


class Bent(nn.Module):
    """3x3 and 1x1 convolutions without norms, summed in some way that is no convolution; `body` tells which."""

    def __init__(self, body: Callable[[Bent, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(C, C, 3, padding=1, bias=bias)
        self.b = nn.Conv2d(C, C, 1, bias=bias)
        self.loose = nn.BatchNorm2d(C, track_running_stats=False)
        self.edge = nn.Parameter(torch.randn(1, C, 9, 9))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


# what is no convolution, by name; each holds two convolutions that must stay two
BENT: dict[str, Callable[[Bent, Tensor], Tensor]] = {
    "activation in a branch": lambda m, x: m.a(x).relu() + m.b(x),
    "padding behind a bias": lambda m, x: m.a(m.b(x)),
    "padding behind padding": lambda m, x: m.a(m.a(x)),
    "kernel made of the input": lambda m, x: F.conv2d(x, m.b(x).mean((0, 2, 3)).reshape(C, 1, 1, 1), groups=C) + m.a(x),
    "scale made of the input": lambda m, x: m.a(x) * x.mean() + m.b(x),
    "product of branches": lambda m, x: m.a(x) * m.b(x),
    "statistics of the batch": lambda m, x: m.loose(m.a(x)) + m.loose(m.b(x)),
    "mean of the batch": lambda m, x: m.a(x) + m.b(x - x.mean(0, keepdim=True)),
    "mean of the picture": lambda m, x: m.a(x) + m.b(x.mean((2, 3), keepdim=True)),
    "largest of a window": lambda m, x: m.a(x) + m.b(F.max_pool2d(x, 3, 1, 1)),
    "reflected border": lambda m, x: m.b(x) + m.a(F.pad(x, (2, 2, 2, 2), mode="reflect"))[..., 2:-2, 2:-2],
    "rolled over": lambda m, x: m.a(x) + m.b(x.roll(1, 3)),
    "flipped": lambda m, x: m.a(x) + m.b(x.flip(3)),
    "clipped far out": lambda m, x: m.a(x.clamp(-1e4, 1e4)) + m.b(x),
    "a position added": lambda m, x: m.a(x) + m.b(x + torch.arange(x.shape[3])),
    "a position of one size": lambda m, x: m.a(x + m.edge) + m.b(x),
    "absolute value": lambda m, x: m.a(x) + m.b(x.abs()),
    "other above a size": lambda m, x: m.a(x) + (m.b(x) if x.shape[3] < 12 else m.b(2 * x)),
    "other above a larger size": lambda m, x: m.a(x) + (m.b(x) if x.shape[3] < 15 else m.b(2 * x)),
    "other for loud pictures": lambda m, x: m.a(x) + (m.b(x) if x.abs().max() < 100 else m.b(2 * x)),
    "other for two pictures": lambda m, x: m.a(x) + m.b(x) * x.shape[0],
    "a random mask": lambda m, x: m.a(x) + m.b(x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5)),
    "average without the border": lambda m, x: m.b(x) + m.a(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    "written into the input": lambda m, x: m.a(x.mul_(0.5)) + m.b(x),
}

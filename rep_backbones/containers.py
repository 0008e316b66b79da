"""The containers that blocks are declared with; `forward` and the rules of `rules.py` read the same ones.

All of them take and give `(n, c, h, w)`. None holds fuse code: what a container folds to stands in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rep_backbones import one_pass, recompute
from rep_backbones.affine import batch_norm, pair

NOTHING = nn.Identity()


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children under each of their names: one that is used twice counts twice, unlike in `named_children`."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


class Parallel(nn.Module):
    """Named branches on one input, summed (`branches`: name -> module)."""

    def __init__(self, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not branches:
            raise ValueError("Parallel needs at least one branch, got none")
        for name, branch in branches.items():
            self.add_module(name, branch)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """The branches by name, in order."""
        return iter(children_of(self))

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and recompute.applies(x):
            return self.trained(x)
        branches = iter(self._modules.values())
        total = next(branches)(x)  # type: ignore[misc]
        for branch in branches:
            total = total + branch(x)  # type: ignore[misc]
        return total

    def trained(self, x: Tensor, activation: nn.Module = NOTHING) -> Tensor:
        """`activation` of the same, with less that is kept for the backward, where `recompute.applies`."""
        if one_pass.chosen(x):
            y = one_pass.joint(self._modules.values(), x, activation)  # type: ignore[arg-type]
            if y is not None:
                return y
        return activation(recompute.added(x, (branch(x) for branch in self._modules.values())))  # type: ignore[misc, no-any-return]


class Block(nn.Sequential):
    """An affine part and what follows it: children `branches`, then the tail (`gate`, `act`, ...).

    The affine part is what fuses; the tail stays as it is. Subclasses only build their children.
    """

    def __init__(self, branches: nn.Module, **tail: nn.Module) -> None:
        super().__init__()
        self.add_module("branches", branches)
        for name, module in tail.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        branches, *tail = self._modules.values()
        if self.training and tail and isinstance(branches, Parallel) and recompute.applies(x):
            if one_pass.chosen(x) and one_pass.untouched(branches):
                x = branches.trained(x, tail[0])
                for module in tail[1:]:
                    x = module(x)
                return x
        return super().forward(x)

    @property
    def affine_part(self) -> nn.Module:
        """The child in front of the tail."""
        return self.get_submodule("branches")


_SERIES = (nn.Sequential.forward, Block.forward)


def runs_in_series(module: nn.Module) -> bool:
    """Whether a module's forward is that of a Sequential: its children, one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward in _SERIES


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, where the body is not affine (else it would be a Parallel)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Concat(nn.Module):
    """The outputs of all parts on one input, concatenated on the channels in order."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Gate(nn.Module):
    """`x * gate(x)`: squeeze-and-excitation and its kin; `gate` gives `(n, c, 1, 1)`."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class PoolPyramid(nn.Module):
    """`x` and three max poolings in series, concatenated: `(n, c, h, w)` -> `(n, 4c, h, w)` (SPPF of YOLOv5)."""

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        if type(k) is not int or k < 1 or k % 2 == 0:
            raise ValueError(f"k={k!r}: pooling keeps the size for odd kernels only; accepted are 1, 3, 5, ...")
        self.pool = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        levels = [x]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        return torch.cat(levels, 1)


class Split(nn.Module):
    """`body` on the first half of the channels, beside the other half as it is: `cat(body(a), b)` (CSPNet, fig. 2)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([self.body(first), second], 1)


class Filter(nn.Module):
    """A fixed depthwise filter, `kernel`: `(c, 1, kh, kw)`, a buffer; zero padding."""

    kernel: Tensor

    def __init__(self, kernel: Tensor, padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)
        self.padding = pair(padding)

    @property
    def channels(self) -> int:
        return self.kernel.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel, padding=self.padding, groups=self.channels)


class Scale(nn.Module):
    """A learned factor on `channels` channels: one for all, or one each (`alpha`: `(1,)` or `(channels,)`)."""

    def __init__(self, channels: int, per_channel: bool = False, value: float = 1.0) -> None:
        super().__init__()
        self.channels = channels
        self.alpha = nn.Parameter(torch.full((channels if per_channel else 1,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha.reshape(-1, 1, 1)


class Subsample(nn.Module):
    """Every stride-th pixel, `x[:, :, ::s, ::s]`.

    In front of a stride-1 1x1 convolution it computes what the strided one does, without the crash of torch 2.15 in the
    backward of a strided 1x1 convolution with few channels_last channels on the CPU.
    """

    def __init__(self, stride: int | tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        sh, sw = pair(self.stride)
        return x[:, :, ::sh, ::sw]

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class PaddedBatchNorm2d(nn.Module):
    """Batch normalization, then padding with what it makes of zero, so that an unpadded convolution behind it folds exactly.

    It stands between a 1x1 and a KxK convolution (DBB, section 3.2): with zero padding there the border would not be affine.
    The norm is a child, `bn`, so that converting a model to SyncBatchNorm leaves the padding where it is.
    """

    bn: nn.BatchNorm2d | nn.SyncBatchNorm

    def __init__(
        self, channels: int, padding: int | tuple[int, int], eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps, momentum)
        self.padding = pair(padding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        ph, pw = self.padding
        if not (ph or pw):
            return x
        fill = self.border().reshape(1, -1, 1, 1)
        # The constant frame is zero padding plus the fill outside the picture: one pad, no in-place writes, differentiable.
        return nn.functional.pad(x - fill, (pw, pw, ph, ph)) + fill

    def border(self) -> Tensor:
        """What the normalization makes of a zero in eval, `(c,)`: from the running statistics, as the padding is not
        data.
        """
        border = batch_norm(self.bn).bias
        assert border is not None  # a norm always has one
        return border

    def extra_repr(self) -> str:
        return f"padding={self.padding}"

"""Small networks whose tensors have the names of other people's published code, to make checkpoints for `load_weights`.

Only names, order of registration and computation are theirs; each gives the outputs of all of its stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv_bn(c1: int, c2: int, k: int, s: int = 1, g: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c2)))


class Merging(nn.Module, ABC):
    """A sum of branches, each `(kernel or None, norm)`, which `deploy` replaces by one convolution called `merged_name`."""

    merged_name = "rbr_reparam"

    @abstractmethod
    def branches(self) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
        """Of one layer."""

    def total(self, x: Tensor) -> Tensor:
        if hasattr(self, self.merged_name):
            return getattr(self, self.merged_name)(x)
        return sum(norm(x if conv is None else conv(x)) for conv, norm in self.branches())  # type: ignore[return-value]

    def deploy(self) -> None:
        branches = self.branches()
        first = branches[0][0]
        assert first is not None
        k, kernel, bias = first.kernel_size[0], torch.zeros(first.weight.shape).double(), torch.zeros(1).double()
        for conv, norm in branches:
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            if conv is None:
                weight = torch.zeros_like(kernel)
                for c in range(len(weight)):
                    weight[c, c % weight.shape[1], k // 2, k // 2] = 1
            else:
                weight = nn.functional.pad(conv.weight.double(), [(k - conv.kernel_size[0]) // 2] * 4)
            kernel = kernel + weight * factor.reshape(-1, 1, 1, 1)
            bias = bias + norm.bias.double() - norm.running_mean.double() * factor
        merged = nn.Conv2d(first.in_channels, len(kernel), k, first.stride, k // 2, groups=first.groups)
        merged.load_state_dict({"weight": kernel.float(), "bias": bias.float()})
        for name in [name for name, child in self.named_children() if name.startswith("rbr_")]:
            delattr(self, name)
        setattr(self, self.merged_name, merged)


@torch.no_grad()
def deployed(model: nn.Module) -> nn.Module:
    """`model` itself, with one convolution for each sum."""
    for module in list(model.modules()):
        if isinstance(module, Merging):
            module.deploy()
    return model


class Gate(nn.Module):
    def __init__(self, c: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Conv2d(c, c // 16, 1))
        setattr(self, names[1], nn.Conv2d(c // 16, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        return x * second(first(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class RepVGGBlock(Merging):
    """DingXiaoH/RepVGG, and YOLOv6 without `se`."""

    def __init__(self, c1: int, c2: int, s: int = 1, g: int = 1, se: bool = False) -> None:
        super().__init__()
        self.se = Gate(c2, ("down", "up")) if se else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 and s == 1 else None
        self.rbr_dense = conv_bn(c1, c2, 3, s, g)
        self.rbr_1x1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(c1, c2, 1, s, groups=g, bias=False), bn=nn.BatchNorm2d(c2)))

    def branches(self) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
        alone = [] if self.rbr_identity is None else [(None, self.rbr_identity)]
        return [tuple(self.rbr_dense), tuple(self.rbr_1x1), *alone]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.total(x)).relu()


class RepVGG(nn.Module):
    def __init__(
        self, widths: Sequence[int], repeats: Sequence[int], nc: int = 10, groups: int = 1, se: bool = False
    ) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(3, widths[0], 2, se=se)
        c1, number = widths[0], 0
        for stage, (c2, n) in enumerate(zip(widths[1:], repeats), 1):
            blocks = []
            for i in range(n):
                number += 1
                blocks.append(RepVGGBlock(c1, c2, 1 if i else 2, 1 if number % 2 else groups, se))
                c1 = c2
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c1, nc)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in range(5):
            x = getattr(self, f"stage{stage}")(x)
            outputs.append(x)
        return [*outputs, self.linear(x.mean((2, 3)))]


class MobileOneBlock(Merging):
    """apple/ml-mobileone."""

    merged_name = "reparam_conv"

    def __init__(self, c1: int, c2: int, k: int, s: int, g: int, n: int, se: bool) -> None:
        super().__init__()
        self.se = Gate(c2, ("reduce", "expand")) if se else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(c1) if c1 == c2 and s == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(c1, c2, k, s, g) for _ in range(n))
        self.rbr_scale = conv_bn(c1, c2, 1, s, g) if k > 1 else None

    def branches(self) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
        found = [tuple(branch) for branch in self.rbr_conv]
        found += [] if self.rbr_scale is None else [tuple(self.rbr_scale)]
        return found + ([] if self.rbr_skip is None else [(None, self.rbr_skip)])  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.total(x)).relu()


class MobileOne(nn.Module):
    def __init__(self, widths: Sequence[int], repeats: Sequence[int], n: int, gated: Sequence[int], nc: int = 10) -> None:
        super().__init__()
        self.stage0 = MobileOneBlock(3, widths[0], 3, 2, 1, 1, False)
        c1 = widths[0]
        for stage, (c2, count, with_gate) in enumerate(zip(widths[1:], repeats, gated), 1):
            blocks = []
            for i in range(count):
                se = i >= count - with_gate
                blocks += [MobileOneBlock(c1, c1, 3, 1 if i else 2, c1, n, se), MobileOneBlock(c1, c2, 1, 1, 1, n, se)]
                c1 = c2
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c1, nc)

    forward = RepVGG.forward


# ---- YOLOv6 --------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolution, norm, activation; `wrapped` under the name `block`, as in release 0.4."""

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, act: type[nn.Module] = nn.ReLU, wrapped: bool = True
    ) -> None:
        super().__init__()
        layers = conv_bn(c1, c2, k, s)
        if wrapped:
            self.block = layers
        else:
            self.conv, self.bn = layers
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(x) if hasattr(self, "block") else self.bn(self.conv(x)))


class Silu(Plain):
    """The layer of size l, with the arguments of a RepVGGBlock."""

    def __init__(self, c1: int, c2: int, s: int = 1) -> None:
        super().__init__(c1, c2, 3, s, nn.SiLU)


class BottleRep(nn.Module):
    def __init__(self, c1: int, c2: int, layer: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = layer(c1, c2), layer(c2, c2)
        self.alpha = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.alpha * x


class RepBlock(nn.Module):
    """n layers in series, the first of them apart."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.conv1 = layers[0]
        self.block = nn.Sequential(*layers[1:]) if len(layers) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x if self.block is None else self.block(x)


class BepC3(nn.Module):
    def __init__(self, c1: int, c2: int, n: int, e: float, layer: type[nn.Module]) -> None:
        super().__init__()
        h, act = int(c2 * e), nn.SiLU if layer is Silu else nn.ReLU
        self.cv1, self.cv2, self.cv3 = Plain(c1, h, 1, 1, act), Plain(c1, h, 1, 1, act), Plain(2 * h, c2, 1, 1, act)
        self.m = RepBlock([BottleRep(h, h, layer) for _ in range(max(n // 2, 1))])

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


def _pyramid(x: Tensor) -> Tensor:
    levels = [x]
    for _ in range(3):
        levels.append(nn.functional.max_pool2d(levels[-1], 5, 1, 2))
    return torch.cat(levels, 1)


class SPPFModule(nn.Module):
    def __init__(self, c: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.cv1, self.cv2 = Plain(c, c // 2, 1, 1, act), Plain(2 * c, c, 1, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(_pyramid(self.cv1(x)))


class CSPSPPFModule(nn.Module):
    def __init__(self, c: int, wrapped: bool) -> None:
        super().__init__()
        h = c // 2
        shapes = [(c, h, 1), (c, h, 1), (h, h, 3), (h, h, 1), (4 * h, h, 1), (h, h, 3), (2 * h, c, 1)]
        for number, (c1, c2, k) in enumerate(shapes, 1):
            setattr(self, f"cv{number}", Plain(c1, c2, k, wrapped=wrapped))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv6(self.cv5(_pyramid(self.cv4(self.cv3(self.cv1(x))))))
        return self.cv7(torch.cat([self.cv2(x), deep], 1))


class BiFusion(nn.Module):
    def __init__(self, c1: int, c2: int, c: int, wrapped: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = Plain(c1, c, 1, wrapped=wrapped), Plain(c2, c, 1, wrapped=wrapped)
        self.cv3 = Plain(3 * c, c, 1, wrapped=wrapped)
        self.upsample = nn.Sequential(OrderedDict(upsample_transpose=nn.ConvTranspose2d(c, c, 2, 2)))
        self.downsample = Plain(c, c, 3, 2, wrapped=wrapped)

    def forward(self, small: Tensor, same: Tensor, large: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.upsample(small), self.cv1(same), self.downsample(self.cv2(large))], 1))


class _Backbone(nn.Module):
    def __init__(self, c: Sequence[int], n: Sequence[int], e: float, layer: type[nn.Module], wrapped: bool) -> None:
        super().__init__()
        self.stem = layer(3, c[0], s=2)  # type: ignore[call-arg]
        for i in range(4):
            body = _stage(c[i + 1], c[i + 1], n[i], e, layer)
            setattr(self, f"ERBlock_{i + 2}", nn.Sequential(layer(c[i], c[i + 1], s=2), body))  # type: ignore[call-arg]
        act = nn.SiLU if layer is Silu else nn.ReLU
        tail: nn.Module = SPPFModule(c[4], act) if e else CSPSPPFModule(c[4], wrapped)
        if wrapped:
            tail = nn.Sequential(OrderedDict([("sppf" if e else "cspsppf", tail)]))
        self.ERBlock_5.append(tail)  # type: ignore[operator]

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [self.stem(x)]
        for i in range(2, 6):
            outputs.append(getattr(self, f"ERBlock_{i}")(outputs[-1]))
        return outputs


def _stage(c1: int, c2: int, n: int, e: float, layer: type[nn.Module]) -> nn.Module:
    return BepC3(c1, c2, n, e, layer) if e else RepBlock([layer(c1 if i == 0 else c2, c2) for i in range(n)])


class _Neck(nn.Module):
    def __init__(self, c: Sequence[int], n: int, e: float, layer: type[nn.Module], wrapped: bool) -> None:
        super().__init__()
        p5, p4, p3 = c[4] // 2, c[4] // 4, c[4] // 8  # widths of the bottom-up half
        self.reduce_layer0 = Plain(c[4], p4, 1, wrapped=wrapped)
        self.Bifusion0 = BiFusion(c[3], c[2], p4, wrapped)
        self.Rep_p4 = _stage(p4, p4, n, e, layer)
        self.reduce_layer1 = Plain(p4, p3, 1, wrapped=wrapped)
        self.Bifusion1 = BiFusion(c[2], c[1], p3, wrapped)
        self.Rep_p3 = _stage(p3, p3, n, e, layer)
        self.downsample2 = Plain(p3, p3, 3, 2, wrapped=wrapped)
        self.Rep_n3 = _stage(2 * p3, p4, n, e, layer)
        self.downsample1 = Plain(p4, p4, 3, 2, wrapped=wrapped)
        self.Rep_n4 = _stage(2 * p4, p5, n, e, layer)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        _, c2, c3, c4, c5 = maps
        top = self.reduce_layer0(c5)
        p4 = self.Rep_p4(self.Bifusion0(top, c4, c3))
        middle = self.reduce_layer1(p4)
        p3 = self.Rep_p3(self.Bifusion1(middle, c3, c2))
        n3 = self.Rep_n3(torch.cat([self.downsample2(p3), middle], 1))
        return [p3, n3, self.Rep_n4(torch.cat([self.downsample1(n3), top], 1))]


class YOLOv6(nn.Module):
    """Stages of `n` RepVGG blocks, or with `e` CSP stages of `layer`, and a head that has no place in ours."""

    def __init__(
        self, c: Sequence[int], n: Sequence[int], e: float = 0, layer: type[nn.Module] = RepVGGBlock, wrapped: bool = True
    ) -> None:
        super().__init__()
        self.backbone = _Backbone(c, n, e, layer, wrapped)
        self.neck = _Neck(c, n[1], e, layer, wrapped)
        self.detect = nn.ModuleDict({"cls_preds": nn.ModuleList([nn.Conv2d(8, 3, 1)])})
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone(x)
        return [*maps, *self.neck(maps)]


# ---- YOLOv7 --------------------------------------------------------------------------------------------------------------


class Conv7(Plain):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(c1, c2, k, s, act, wrapped=False)


class RepConv7(Merging):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 else None
        self.rbr_dense = nn.Sequential(*conv_bn(c1, c2, 3))
        self.rbr_1x1 = nn.Sequential(*conv_bn(c1, c2, 1))

    branches = RepVGGBlock.branches

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.total(x))


class SPPCSPC7(nn.Module):
    def __init__(self, c1: int, h: int) -> None:
        super().__init__()
        shapes = [(c1, h, 1), (c1, h, 1), (h, h, 3), (h, h, 1), (4 * h, h, 1), (h, h, 3), (2 * h, h, 1)]
        for number, shape in enumerate(shapes, 1):
            setattr(self, f"cv{number}", Conv7(*shape))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.cv4(self.cv3(self.cv1(x)))
        pooled = [nn.functional.max_pool2d(x1, k, 1, k // 2) for k in (5, 9, 13)]
        deep = self.cv6(self.cv5(torch.cat([x1, *pooled], 1)))
        return self.cv7(torch.cat([deep, self.cv2(x)], 1))


class Implicit(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.zeros(1, c, 1, 1))


class IDetect(nn.Module):
    """A head that has no place in ours; it only holds its tensors."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.m, self.ia, self.im = (nn.ModuleList([made]) for made in (nn.Conv2d(c, 24, 1), Implicit(c), Implicit(24)))
        self.register_buffer("anchors", torch.zeros(1, 3, 2))
        self.register_buffer("anchor_grid", torch.zeros(1, 1, 3, 1, 1, 2))


class YOLOv7(nn.Module):
    """A row of layers as numbered in a file of YOLOv7: two plain ones, a pooling, SPPCSPC, a stack with a concatenation,
    two planned RepConvs (one with an identity), the head.
    """

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv7(3, c, 3, 2), Conv7(c, 2 * c, 3, 2), nn.MaxPool2d(2, 2), SPPCSPC7(2 * c, 2 * c)]
        layers += [Conv7(2 * c, c), Conv7(2 * c, c), nn.Identity(), RepConv7(2 * c, 2 * c), RepConv7(2 * c, 4 * c)]
        self.model = nn.Sequential(*layers, IDetect(4 * c))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3

    YAML = {
        "nc": 3,
        "backbone": [
            [-1, 1, "Conv", [8, 3, 2]],
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, "nn.MaxPool2d", [2, 2]],
            [-1, 1, "SPPCSPC", [16]],
            [-1, 1, "Conv", [8, 1, 1]],
            [-2, 1, "Conv", [8, 1, 1]],
            [[-1, -2], 1, "Concat", [1]],
            [-1, 1, "RepConv", [16, 3, 1]],
            [-1, 1, "RepConv", [32, 3, 1]],
        ],
        "head": [[[7, 8], 1, "Detect", ["nc"]]],
    }

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = self.model
        outputs = [rows[0](x)]
        for row in rows[1:4]:
            outputs.append(row(outputs[-1]))
        outputs += [rows[4](outputs[-1]), rows[5](outputs[-1])]
        outputs.append(torch.cat([outputs[5], outputs[4]], 1))
        outputs.append(rows[7](outputs[-1]))
        return [*outputs, rows[8](outputs[-1])]

"""The affine convolution as a value, and the algebra that structural re-parameterization is made of.

An `AffineConv` is what a `torch.nn.Conv2d` computes in zero padding, without being a module: a kernel, a bias and the four
hyper-parameters. Branches in parallel are `a + b`, branches in series are `a.then(b)`, and nothing else in this package
multiplies kernels. All operations are differentiable and keep dtype and device, so they serve inside a `forward` too.

An operation that has no exact result for every input raises `AlgebraError`: what is right in the interior may be wrong at
the border. The transforms are those of Ding et al., "Diverse Branch Block", CVPR 2021 (named I to VI there).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor, nn

from rep_backbones.blank import BlankConv

Pair = tuple[int, int]


class AlgebraError(ValueError):
    """Two affine convolutions that have no exact common form, with the reason and the remedy."""


def pair(value: int | tuple[int, ...]) -> Pair:
    """`3` or `(3, 3)` as `(3, 3)`: height first."""
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise AlgebraError(f"expected an integer or a pair (height, width), got {value!r}")
    return value[0], value[1]


@dataclass(frozen=True, eq=False)
class AffineConv:
    """The affine map `x -> conv2d(x, weight, bias, stride, padding, dilation, groups)` with zero padding.

    Attributes:
        weight: `(c2, c1 / groups, kh, kw)`, floating point.
        bias: `(c2,)`, or None for a linear map. None and zeros compute the same.
        stride, padding, dilation: pairs (height, width), in pixels.
        groups: the number of channel groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def extent(self) -> Pair:
        """Height and width of the field that one output sees, dilation included, in pixels."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def per_channel(self) -> bool:
        """Whether each output channel is a multiple of its own input channel at the same pixel, plus a bias."""
        pointwise = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return pointwise and self.groups == self.in_channels == self.out_channels

    def __call__(self, x: Tensor) -> Tensor:
        """The map itself, `(n, c1, h, w)` -> `(n, c2, h', w')`."""
        return torch.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def __repr__(self) -> str:
        (kh, kw), bias = self.kernel_size, "no bias" if self.bias is None else "bias"
        return (
            f"AffineConv({self.in_channels} -> {self.out_channels}, kernel {kh}x{kw}, stride {self.stride}, "
            f"padding {self.padding}, dilation {self.dilation}, groups {self.groups}, {bias})"
        )

    # ---- nn.Conv2d in and out ---------------------------------------------------------------------------------------

    @staticmethod
    def from_conv(conv: nn.Conv2d) -> AffineConv:
        """The value of a convolution layer; shares its parameters.

        Raises:
            AlgebraError: for a padding mode other than "zeros", and padding="same" with an even extent.
        """
        if conv.padding_mode != "zeros":
            raise AlgebraError(f"padding_mode={conv.padding_mode!r} is not affine at the border; only 'zeros' is")
        dilation, kernel = pair(conv.dilation), pair(conv.kernel_size)
        if conv.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
            if any(t % 2 for t in totals):
                raise AlgebraError(
                    f"padding='same' with kernel {kernel} and dilation {dilation} pads one side more than the other"
                )
            padding = (totals[0] // 2, totals[1] // 2)
        else:
            padding = (0, 0) if conv.padding == "valid" else pair(conv.padding)  # type: ignore[arg-type]
        return AffineConv(conv.weight, conv.bias, pair(conv.stride), padding, dilation, conv.groups)

    def to_conv(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """A new `nn.Conv2d` with this kernel, always with a bias, on the kernel's device, in its dtype or the given one."""
        c2, dtype, device = self.out_channels, dtype or self.weight.dtype, self.weight.device
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        conv = BlankConv(self.in_channels, c2, *sizes, dtype=dtype, device=device)
        conv.__class__ = nn.Conv2d  # type: ignore[assignment]
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            conv.bias.copy_(self.bias) if self.bias is not None else conv.bias.zero_()  # type: ignore[union-attr]
        return conv

    def to(self, dtype: torch.dtype) -> AffineConv:
        """The same map in another floating point type."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    # ---- the same map in another form -------------------------------------------------------------------------------

    def undilated(self) -> AffineConv:
        """The dilated kernel with its zeros written out (UniRepLKNet, eq. 3)."""
        if self.dilation == (1, 1):
            return self
        (eh, ew), (dh, dw) = self.extent, self.dilation
        weight = self.weight.new_zeros(*self.weight.shape[:2], eh, ew)
        weight[:, :, ::dh, ::dw] = self.weight
        return replace(self, weight=weight, dilation=(1, 1))

    def embedded(self, kernel_size: Pair, padding: Pair, dilation: Pair = (1, 1)) -> AffineConv:
        """The same map written with a larger kernel and its padding (transform VI).

        A tap at index a reads x[i*s - p + d*a], so per axis `(P - p) / d` zeros go in front and `K - k - (P - p) / d`
        behind. Padding is symmetric, so the two must be equal, or the sizes of the outputs differ for some input.

        Raises:
            AlgebraError: where the two differ, are negative or not whole.
        """
        if (kernel_size, padding, dilation) == (self.kernel_size, self.padding, self.dilation):
            return self
        # A kernel of extent 1 is the same under any dilation.
        fits = all(k == 1 or d == wanted for k, d, wanted in zip(self.kernel_size, self.dilation, dilation))
        value = self if fits else self.undilated()
        steps = dilation if fits else (1, 1)
        if not fits and dilation != (1, 1):
            raise AlgebraError(f"a kernel with dilation {self.dilation} can't be written with dilation {dilation}")
        front = [(P - p) / d for P, p, d in zip(padding, value.padding, steps)]
        behind = [K - k - f for K, k, f in zip(kernel_size, value.kernel_size, front)]
        if min(*front, *behind) < 0 or front != behind or not all(f.is_integer() for f in front):
            raise AlgebraError(
                f"a kernel {value.kernel_size} with padding {value.padding} does not embed into kernel {kernel_size} with "
                f"padding {padding} and dilation {dilation}: it would need {_plain(front)} zeros in front and "
                f"{_plain(behind)} behind, which must be equal, whole and not negative. Kernel sizes of parallel branches "
                "must differ by an even number, and paddings by half of what that adds to the extent"
            )
        top, left = int(front[0]), int(front[1])
        weight = nn.functional.pad(value.weight, (left, left, top, top))
        return replace(value, weight=weight, padding=padding, dilation=dilation)

    def regrouped(self, groups: int) -> AffineConv:
        """The same map written with fewer groups, zeros where the groups do not meet.

        Raises:
            AlgebraError: if `groups` does not divide the present number of groups.
        """
        if groups == self.groups:
            return self
        if groups < 1 or self.groups % groups:
            raise AlgebraError(f"{self.groups} groups can't be written as {groups}: the new number must divide the old one")
        c2, cg, kh, kw = self.weight.shape
        merged = self.groups // groups  # old groups in each new one
        blocks = self.weight.reshape(groups, merged, c2 // self.groups, cg, kh, kw)
        # the block diagonal as a product: one that can be traced and exported, unlike a write by indices
        diagonal = torch.eye(merged, dtype=blocks.dtype, device=blocks.device).reshape(1, merged, 1, merged, 1, 1, 1)
        weight = blocks.unsqueeze(3) * diagonal
        return replace(self, weight=weight.reshape(c2, merged * cg, kh, kw), groups=groups)

    def dense(self) -> AffineConv:
        """The same map with one group."""
        return self.regrouped(1)

    def tightened(self) -> AffineConv:
        """The same map with the fewest taps and the most groups: `embedded`, `undilated`, `regrouped` backwards.

        Zero borders are cut as far as the padding is, on both sides alike; rows and columns of zeros between taps become
        dilation, and zeros between blocks of channels become groups.
        """
        value = self.undilated()
        cut, dilation = [], []
        for axis, (size, padding) in enumerate(zip(value.kernel_size, value.padding)):
            taps = value.weight.ne(0).any(3 - axis).any(1).any(0).nonzero().flatten().tolist() or [(size - 1) // 2]
            cut.append(max(min(taps[0], size - 1 - taps[-1], padding), 0))
            ends = [0, size - 1 - 2 * cut[axis]]  # both must stay taps, or the extent would change
            dilation.append(gcd(*ends, *(t - cut[axis] for t in taps)) or 1)
        (ch, cw), (dh, dw), (kh, kw), (ph, pw) = cut, dilation, value.kernel_size, value.padding
        weight = value.weight[:, :, ch : kh - ch : dh, cw : kw - cw : dw]
        return replace(value, weight=weight, padding=(ph - ch, pw - cw), dilation=(dh, dw))._split()

    def _split(self) -> AffineConv:
        """With the most groups that lose nothing: the kernel of each present group is block-diagonal in equal blocks."""
        g, (c2, cg, kh, kw) = self.groups, self.weight.shape
        meet = self.weight.ne(0).any(3).any(2).reshape(g, c2 // g, cg).any(0)  # (c2 / g, c1 / g), in any of the groups
        for parts in range(gcd(c2 // g, cg), 1, -1):
            if (c2 // g) % parts or cg % parts:
                continue
            blocks = meet.reshape(parts, c2 // g // parts, parts, cg // parts).any(3).any(1)
            if not (blocks & ~torch.eye(parts, dtype=torch.bool, device=blocks.device)).any():
                inner = torch.arange(parts, device=blocks.device)
                weight = self.weight.reshape(g, parts, c2 // g // parts, parts, cg // parts, kh, kw)[:, inner, :, inner]
                weight = weight.transpose(0, 1).reshape(c2, cg // parts, kh, kw)
                return replace(self, weight=weight, groups=g * parts)
        return self

    # ---- the algebra ------------------------------------------------------------------------------------------------

    def scaled(self, factor: Tensor) -> AffineConv:
        """Every output channel times its factor, `(c2,)` or `(1,)`: BN, layer scale, residual weights (transform I)."""
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor.reshape(-1, 1, 1, 1), bias=bias)

    def shifted(self, bias: Tensor) -> AffineConv:
        """A constant `(c2,)` added to every output channel."""
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def __add__(self, other: AffineConv) -> AffineConv:
        """Parallel branches that are summed (transform II); the smaller kernel is embedded into the larger one.

        Raises:
            AlgebraError: if channels, strides or groups differ, or if the kernels can't be aligned.
        """
        a, b = self, other
        for what in ("in_channels", "out_channels", "stride", "groups"):
            x, y = getattr(a, what), getattr(b, what)
            if x != y:
                remedy = "; write both with the same number of groups (`regrouped`, `dense`)" if what == "groups" else ""
                raise AlgebraError(f"parallel branches must have equal {what}, got {x} and {y}{remedy}")
        frame = _common_frame(a, b)
        x, y = a.embedded(*frame), b.embedded(*frame)
        if x is not a:  # its padded kernel is new: in place, as a sum apart would be another one of full size
            weight = x.weight.add_(y.weight)
        elif y is not b:
            weight = y.weight.add_(x.weight)
        else:
            weight = x.weight + y.weight
        total = replace(x, weight=weight)
        return total if b.bias is None else total.shifted(b.bias)

    def then(self, other: AffineConv, *, regroup: bool = False) -> AffineConv:
        """This map followed by `other` (transform III).

        Args:
            regroup: where the numbers of groups differ, write the result with their greatest common divisor instead of
                refusing: depthwise behind dense is dense.

        Zero padding between two convolutions is not a convolution at the border, so `other` must not pad; or, where it does,
        this map must be pointwise on that axis and without a bias that the padding would have to be filled with.

        Raises:
            AlgebraError: if the channels do not fit, if `other` pads where it must not, or if the groups differ.
        """
        a, b = self, other
        if a.out_channels != b.in_channels:
            raise AlgebraError(f"in series, {a.out_channels} channels come out and {b.in_channels} go in")
        for axis, name in enumerate(("height", "width")):
            if b.padding[axis] and (a.extent[axis] > 1 or a.padding[axis]):
                raise AlgebraError(
                    f"in series, the second convolution pads {b.padding[axis]} in {name} behind a first one of extent "
                    f"{a.extent[axis]} and padding {a.padding[axis]}: not a convolution at the border. Put all padding in "
                    "front of the first"
                )
        if any(b.padding) and a.bias is not None:
            raise AlgebraError(
                f"in series, the second convolution pads {b.padding} with zeros behind a first one with a bias: not a "
                "convolution at the border. Pad with the bias instead (containers.PaddedBatchNorm2d), or pad in front"
            )
        if replace(b, padding=(0, 0)).per_channel:
            value = replace(a.scaled(b.weight.reshape(-1)), padding=_added(a.padding, _times(a.stride, b.padding)))
            return value if b.bias is None else value.shifted(b.bias)
        if replace(a, stride=(1, 1)).per_channel:
            value = _after_scale(a, b)
            padding, dilation = _times(a.stride, b.padding), _times(a.stride, b.dilation)
            return replace(
                value,
                stride=_times(a.stride, b.stride),
                padding=padding,
                dilation=pair(tuple(d if k > 1 else 1 for d, k in zip(dilation, b.kernel_size))),
            )
        if a.groups != b.groups:
            if not regroup:
                raise AlgebraError(
                    f"in series, {a.groups} groups meet {b.groups}; write both with the same number (`regrouped`, `dense`)"
                )
            common = gcd(a.groups, b.groups)
            if common != min(a.groups, b.groups):
                a, b = a.regrouped(common), b.regrouped(common)
        return _composed(a, b)


def _common_frame(a: AffineConv, b: AffineConv) -> tuple[Pair, Pair, Pair]:
    """The kernel size, padding and dilation that serve both maps: the dilation is kept where both have it."""
    shared = all(x == y or 1 in (j, k) for x, y, j, k in zip(a.dilation, b.dilation, a.kernel_size, b.kernel_size))
    kernels = (a.kernel_size, b.kernel_size) if shared else (a.extent, b.extent)
    dilation = tuple(y if j == 1 else x for x, y, j in zip(a.dilation, b.dilation, a.kernel_size)) if shared else (1, 1)
    return tuple(map(max, *kernels)), tuple(map(max, a.padding, b.padding)), dilation  # type: ignore[return-value]


def _plain(numbers: list[float]) -> tuple[float | int, ...]:
    return tuple(int(n) if float(n).is_integer() else n for n in numbers)


def _after_scale(a: AffineConv, b: AffineConv) -> AffineConv:
    """`b` behind a per-channel scale and bias: its input columns are scaled, its bias gathers the constant."""
    c2, cg, _, _ = b.weight.shape
    factor = a.weight.reshape(b.groups, 1, cg).expand(b.groups, c2 // b.groups, cg).reshape(c2, cg, 1, 1)
    value = replace(b, weight=b.weight * factor)
    return value if a.bias is None else value.shifted(_response_to(a.bias, b))


def _response_to(constant: Tensor, b: AffineConv) -> Tensor:
    """What `b`'s kernel makes of a constant `(c1,)` on every pixel, `(c2,)`."""
    c2, cg, _, _ = b.weight.shape
    total = b.weight.sum((2, 3)).reshape(b.groups, c2 // b.groups, cg)
    return (total @ constant.reshape(b.groups, cg, 1)).reshape(c2)


def _composed(a: AffineConv, b: AffineConv) -> AffineConv:
    """`a` then `b` where `b`'s padding is known to be exact: the kernels are convolved, group by group.

    Of the two numbers of groups one divides the other; the result has the smaller one.
    """
    if all(k == 1 or j == 1 for j, k in zip(a.kernel_size, b.kernel_size)):
        dilation = tuple(
            da if kb == 1 else sa * db for da, sa, db, kb in zip(a.dilation, a.stride, b.dilation, b.kernel_size)
        )
        first, second = a.weight, b.weight
    else:
        dilation = (1, 1)
        first, second = a.undilated().weight, replace(b, dilation=_times(a.stride, b.dilation)).undilated().weight
    g, coarse = max(a.groups, b.groups), min(a.groups, b.groups)
    cm, merged = a.out_channels // g, g // b.groups  # middle channels of a fine group; fine groups in each of b's
    (ha, wa), (hb, wb) = first.shape[2:], second.shape[2:]
    left = second.reshape(b.groups, -1, merged, cm, hb, wb).transpose(1, 2).reshape(g, -1, cm, hb, wb)
    right = first.reshape(g, cm, -1, ha, wa)
    c2 = left.shape[1]
    # Output tap u = s + t: a full convolution of the two kernels, written as a product over the middle channels for each
    # tap of b; in one product behind a 1x1 kernel, as an online fold makes it in each step.
    flat = right.reshape(g, cm, -1)
    if (ha, wa) == (1, 1):
        product = left.permute(0, 1, 3, 4, 2).reshape(g, -1, cm) @ flat
        weight = product.reshape(g, c2, hb, wb, -1).permute(0, 1, 4, 2, 3).contiguous()
    else:
        weight = first.new_zeros(g, c2, right.shape[2], ha + hb - 1, wa + wb - 1)
        for s in range(hb):
            for t in range(wb):
                product = (left[..., s, t] @ flat).reshape(g, c2, -1, ha, wa)
                weight = weight + nn.functional.pad(product, (t, wb - 1 - t, s, hb - 1 - s))
    padding = _added(a.padding, _times(a.stride, b.padding))
    bias = b.bias
    if a.bias is not None:
        carried = _response_to(a.bias, b)
        bias = carried if bias is None else bias + carried
    # (g, c2, ci) -> (coarse, c2, merged * ci): b's columns run over all fine groups that it joins
    weight = weight.reshape(b.groups, merged, c2, *weight.shape[2:]).transpose(1, 2)
    weight = weight.reshape(b.out_channels, -1, *weight.shape[-2:])
    return AffineConv(weight, bias, _times(a.stride, b.stride), padding, dilation, coarse)  # type: ignore[arg-type]


def _added(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0], a[1] * b[1]


def concat(values: list[AffineConv]) -> AffineConv:
    """Branches whose outputs are concatenated on the channels (transform IV); all must be dense.

    Raises:
        AlgebraError: for grouped values, or if strides, input channels or kernels do not fit.
    """
    if any(v.groups != 1 for v in values):
        raise AlgebraError(
            f"a concatenation needs dense branches, got groups {[v.groups for v in values]}; write them as `dense()`"
        )
    first = values[0]
    for v in values[1:]:
        if (v.in_channels, v.stride) != (first.in_channels, first.stride):
            raise AlgebraError(f"concatenated branches must have equal input channels and stride, got {first!r} and {v!r}")
    values = align(values)
    biases = [v.weight.new_zeros(v.out_channels) if v.bias is None else v.bias for v in values]
    bias = None if all(v.bias is None for v in values) else torch.cat(biases)
    return replace(values[0], weight=torch.cat([v.weight for v in values]), bias=bias)


def align(values: list[AffineConv]) -> list[AffineConv]:
    """The same maps, all with one kernel size, padding and dilation.

    Raises:
        AlgebraError: where a kernel can't be embedded.
    """
    widest = values[0]
    for v in values[1:]:
        widest = widest.embedded(*_common_frame(widest, v))
    return [v.embedded(*_common_frame(v, widest)) for v in values]


def identity(channels: int, like: Tensor | None = None) -> AffineConv:
    """The identity on `channels` channels, as a per-channel value; dtype and device of `like`."""
    weight = torch.ones(channels) if like is None else like.new_ones(channels)
    return per_channel(weight)


def per_channel(factor: Tensor, bias: Tensor | None = None) -> AffineConv:
    """`factor * x + bias`, each `(c,)`."""
    return AffineConv(factor.reshape(-1, 1, 1, 1), bias, groups=factor.numel())


def batch_norm(bn: nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm) -> AffineConv:
    """Batch normalization in eval as a per-channel value: `gamma / sqrt(var + eps) * (x - mean) + beta`.

    Raises:
        AlgebraError: without running statistics, where BN depends on its batch.
    """
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise AlgebraError("a norm without running statistics (track_running_stats=False) is not affine in eval")
    factor = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        factor = factor * bn.weight
    bias = -mean * factor
    return per_channel(factor, bias if bn.bias is None else bias + bn.bias)


def gamma_for_eps(gamma: Tensor, variance: Tensor, eps: float, wanted: float) -> Tensor:
    """The weight, `(c,)`, with which a norm of another eps computes the same in eval: its factor is kept, not its eps."""
    if eps == wanted:
        return gamma
    exact = gamma.double() * ((variance.double() + wanted) / (variance.double() + eps)).sqrt()
    return exact.to(gamma.dtype)


def average_pool(
    channels: int, kernel: Pair, stride: Pair, padding: Pair = (0, 0), like: Tensor | None = None
) -> AffineConv:
    """Average pooling (zeros counted) as a depthwise value (transform V)."""
    weight = torch.empty(0) if like is None else like
    full = weight.new_full((channels, 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
    return AffineConv(full, None, stride, padding, groups=channels)


def subsample(channels: int, stride: Pair, like: Tensor | None = None) -> AffineConv:
    """Every stride-th pixel, `x[:, :, ::s, ::s]`, as a per-channel value with a stride."""
    return replace(identity(channels, like), stride=stride)

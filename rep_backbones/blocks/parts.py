"""The parts that several blocks are declared with."""

from __future__ import annotations

import copy
from collections import OrderedDict

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


def hidden_channels(c: int, e: float) -> int:
    """`int(c * e)`, of which there must be one.

    Raises:
        ValueError: for an `e` that leaves none.
    """
    if not (hidden := int(c * e)) > 0:
        raise ValueError(f"e={e!r} of {c} channels leaves none inside; accepted are fractions of at least {1 / c:.3g}")
    return hidden


def same_padding(k: Size, d: Size = 1, p: Size | None = None) -> Pair:
    """`p`, or the padding that keeps the size at stride 1: `d * (k - 1) // 2` per axis."""
    if p is not None:
        return pair(p)
    (kh, kw), (dh, dw) = pair(k), pair(d)
    return dh * (kh - 1) // 2, dw * (kw - 1) // 2


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


def squeeze_excite(c: int, reduction: int = 16) -> Gate:
    """Squeeze-and-excitation (Hu et al., CVPR 2018) as RepVGG places it: between the sum and the activation."""
    hidden = max(1, c // reduction)
    return Gate(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, c, 1), nn.Sigmoid())
    )

"""One layer of a file into one layer of a model: as it is, with its branches merged, or as the main branch of several.

In eval the layer of the model then computes what that of the file does. All kernels go through the algebra.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from rep_backbones.affine import AffineConv, gamma_for_eps
from rep_backbones.candidates import ExpandError
from rep_backbones.containers import Parallel
from rep_backbones.expand import silence
from rep_backbones.rules import FoldError, in_float64
from rep_backbones.weights.errors import WeightsError
from rep_backbones.weights.report import listed
from rep_backbones.weights.units import COUNTER, Unit

MERGED = {"conv.weight", "conv.bias"}
NORM = ("weight", "bias", "running_mean", "running_var")
TORCHS_EPS = 1e-5  # and that of all our backbones
Slots = dict[str, Tensor]


def transferred(source: Unit, target: Unit, tensors: dict[str, Tensor], eps: float | None) -> tuple[Slots, str]:
    """The target's tensors by slot, and how they were made: "copied", "folded" or "unfolded".

    Args:
        eps: of the source's norms; None for that of the target's.

    Raises:
        WeightsError: where the two are layers of different kinds or shapes, or one is not whole, naming the keys.
    """
    given = {slot: tensors[key] for slot, key in source.keys.items()}
    if "bn.running_mean" in given and "conv.bias" in given:  # a convolution with a bias in front of its norm
        given["bn.running_mean"] = given["bn.running_mean"] - given.pop("conv.bias")
    slots = {slot for slot in given if not slot.endswith(COUNTER)}
    _check_shapes(source, target, given, slots)
    if slots == target.slots:
        return _with_eps(given, target, eps), "copied"
    if slots == MERGED and _norms(target.slots):
        return _unfolded(source, target, given), "unfolded"
    if target.slots == MERGED and _norms(slots):
        return _folded(source, target, given, eps), "folded"
    missing, extra = sorted(target.slots - slots), sorted(slots - target.slots)
    said = [f"it has no {listed(missing, 3)} for {target.keys[missing[0]]}"] if missing else []
    said += [f"its {source.keys.get(extra[0], extra[0])} has no place there"] if extra else []
    raise WeightsError(f"layer {source.name} of the file does not fit {target.name} of the model: {', and '.join(said)}")


def _check_shapes(source: Unit, target: Unit, given: Slots, slots: set[str]) -> None:
    state = target.part.state_dict()
    for slot in sorted(slots & target.slots, key=list(given).index):
        if given[slot].shape != state[slot].shape:
            raise WeightsError(_mismatch(source, target, slot, tuple(given[slot].shape), tuple(state[slot].shape)))


def _mismatch(source: Unit, target: Unit, slot: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    key = source.keys.get(slot, source.name)
    text = f"{key} {given} does not fit {target.keys.get(slot, target.name)} {wanted} of the model"
    if slot.startswith("linear."):
        return (
            f"{text}: the file has {given[0]} classes and the model {wanted[0]}; build the model with "
            f"num_classes={given[0]}, or give strict=False to keep the model's own last layer"
        )
    return text


def _norms(slots: set[str]) -> list[str]:
    """Beginnings of the slots of batch norms, such as `1x1.bn.`."""
    return sorted(slot.removesuffix("running_var") for slot in slots if slot.endswith("running_var"))


def _with_eps(given: Slots, target: Unit, eps: float | None) -> Slots:
    """The same functions by the target's norms, whose eps is not in the file."""
    if eps is None:
        return given
    changed = dict(given)
    for norm in _norms(set(given)):
        wanted = target.part.get_submodule(norm.removesuffix(".")).eps
        changed[f"{norm}weight"] = gamma_for_eps(given[f"{norm}weight"], given[f"{norm}running_var"], eps, wanted)  # type: ignore[arg-type]
    return changed


# ---- branches -> one convolution -----------------------------------------------------------------------------------------


def _folded(source: Unit, target: Unit, given: Slots, eps: float | None) -> Slots:
    if eps is None and target.row:  # Ultralytics sets an eps of its own in some of its models
        raise WeightsError(
            f"{source.name} would be merged for {target.name}, and the eps of its norms is not in a state dict; load it "
            "into the training form of the model, and fuse that"
        )
    wanted = AffineConv.from_conv(target.part.get_submodule("conv"))  # type: ignore[arg-type]
    rest = {slot for slot in given if not slot.endswith(COUNTER)}
    branches: OrderedDict[str, nn.Module] = OrderedDict()
    for norm in _norms(rest):
        if absent := [norm + name for name in NORM if norm + name not in rest]:
            raise WeightsError(f"layer {source.name} of the file has no {absent[0]}")
        rest -= {norm + name for name in NORM}
        layers: OrderedDict[str, nn.Module] = OrderedDict(bn=_norm_of(given, norm, eps))
        name = norm.removesuffix("bn.")
        if name != norm:  # else the norm is alone, on the identity
            if (kernel := f"{name}conv.weight") not in rest:
                raise WeightsError(f"layer {source.name} of the file has no {kernel}")
            rest.remove(kernel)
            layers["conv"] = _conv_of(given[kernel], wanted)
            layers.move_to_end("bn")
        branches[name.replace(".", "_") or "plain"] = nn.Sequential(layers)
    if rest:
        raise WeightsError(
            f"{source.keys[min(rest)]} is no part of a sum of convolutions with norms; load the file into a model of its "
            "own training form, and fuse that"
        )
    try:
        value = in_float64(Parallel(branches).eval())
    except FoldError as error:
        raise WeightsError(f"layer {source.name} of the file cannot be merged for {target.name}: {error}") from error
    if value.weight.shape != wanted.weight.shape:
        merged, shape = tuple(value.weight.shape), tuple(wanted.weight.shape)
        raise WeightsError(f"layer {source.name} of the file, merged {merged}, does not fit {target.name} {shape}")
    assert value.bias is not None  # each norm has one
    return {"conv.weight": value.weight, "conv.bias": value.bias}


def _norm_of(given: Slots, norm: str, eps: float | None) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(given[f"{norm}weight"].numel(), eps=TORCHS_EPS if eps is None else eps).double()
    made.load_state_dict({name: given[norm + name] for name in NORM}, strict=False)
    return made


def _conv_of(weight: Tensor, wanted: AffineConv) -> nn.Conv2d:
    """A branch's convolution: its kernel is centred on the one that is wanted."""
    less = [(large - small) // 2 for large, small in zip(wanted.kernel_size, weight.shape[2:])]
    padding = (wanted.padding[0] - less[0], wanted.padding[1] - less[1])
    return AffineConv(weight.double(), None, wanted.stride, padding, (1, 1), wanted.groups).to_conv()


# ---- one convolution -> the main branch ----------------------------------------------------------------------------------


def _unfolded(source: Unit, target: Unit, given: Slots) -> Slots:
    """The tensors of a sum that computes, in eval, what one convolution does.

    Branches that end in a norm or scale start silent, as `expand` has them; what else is summed is taken off the main one.
    The main norm's statistics are neutral, mean 0 and variance 1, as one convolution says nothing of its own.
    """
    part = copy.deepcopy(target.part).to("cpu", torch.float64).eval()
    branches = dict(part.items()) if isinstance(part, Parallel) else {"": part}
    name, main = next(iter(branches.items()))
    layers = dict(main.named_children())
    conv, norm = layers.get("conv"), layers.get("bn")
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise WeightsError(
            f"{source.name} is one convolution, which can't be spread over {target.name}: its first branch is no "
            "convolution with a norm; load it into the fused form of the model"
        )
    if given["conv.weight"].shape != conv.weight.shape:
        slot = f"{name}.conv.weight".lstrip(".")
        shapes = tuple(given["conv.weight"].shape), tuple(conv.weight.shape)
        raise WeightsError(f"{source.keys['conv.weight']} {shapes[0]} does not fit {target.keys[slot]} {shapes[1]}")
    value = replace(AffineConv.from_conv(conv), weight=given["conv.weight"].double(), bias=given["conv.bias"].double())
    loud = {}
    for branch, module in list(branches.items())[1:]:
        try:
            silence(module, branch)
        except ExpandError:
            loud[branch] = module
    if loud:
        value = value + in_float64(Parallel(loud)).scaled(torch.full((1,), -1.0, dtype=torch.float64))
    with torch.no_grad():
        norm.reset_running_stats()
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        norm.bias.copy_(given["conv.bias"] if value.bias is None else value.bias)
        conv.weight.copy_(value.weight)
    return dict(part.state_dict())

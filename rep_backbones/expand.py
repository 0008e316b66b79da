"""expand(): plain convolutions become multi-branch layers that compute the same, to the last bit, at step 0.

The original convolution and its norm become the main branch. The new branches end in a norm or scale that starts at zero,
so they are silent in eval and in train mode, and learn from the first step on. `fuse` gives the plain network back.
"""

from __future__ import annotations

import copy
import inspect
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rep_backbones.affine import AffineConv, AlgebraError
from rep_backbones.candidates import ExpandError, Kernels, Layers, choose, plain_convs
from rep_backbones.containers import Block, Parallel, Scale
from rep_backbones.gradient_form import Masks, mask, masks_of
from rep_backbones.online import Online
from rep_backbones.pairs import norms_behind
from rep_backbones.registry import layer_named
from rep_backbones.rules import MERGED, RULES, FoldError, equivalent, in_float64
from rep_backbones.training_forms import BRANCHES, FORMS, GRADIENT, ONLINE, checked

SHARE = 0.1  # spread of a calibrated branch, as a fraction of its convolution's: what it adds, the main branch takes off
QUIET = 0.01  # smallest variance of a calibrated channel, as a fraction of the layer's median


class Expanded(nn.Sequential):
    """A multi-branch layer in the place of a plain convolution; its children fold to that convolution as a whole.

    Attributes:
        main: path of the branch that holds the original convolution, as `conv`.
        norm_here: path of the norm that followed the convolution, "" where none did.
        norm_there: where that norm stood, as a path relative to this layer's parent ("../" for each level up).
    """

    def __init__(self, layers: OrderedDict[str, nn.Module], main: str, norm_here: str, norm_there: str) -> None:
        super().__init__(layers)
        self.main = main
        self.norm_here = norm_here
        self.norm_there = norm_there

    @property
    def conv(self) -> nn.Conv2d:
        """The original convolution."""
        return self.get_submodule(f"{self.main}.conv")  # type: ignore[return-value]

    @property
    def in_channels(self) -> int:
        """As on the convolution, where other code asks for it."""
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        """As on the convolution, where other code asks for it."""
        return self.conv.out_channels


RULES[Expanded] = RULES[nn.Sequential]
MERGED.add(Expanded)


def expand(
    model: nn.Module,
    block: str | type[nn.Module],
    *,
    layers: Layers = None,
    kernels: Kernels = None,
    batches: Iterable[Any] | None = None,
    mode: str = BRANCHES,
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """A copy of the model with branches beside its plain convolutions, computing the same.

    Args:
        model: any nn.Module, in train or eval mode, of any dtype and device.
        block: the name or class of a block whose affine part is a sum, such as "RepConv" or "DiverseBranchBlock".
        layers: which convolutions: a name or pattern such as "model.0.conv", "backbone.*" (a name of a module means all
            below it), several of them, or a predicate `(path, conv) -> bool`; of those that patterns and predicates match,
            each that a batch normalization follows. By default all of these with a kernel over 1x1.
        kernels: kernel sizes to take, such as `3` or `[3, (1, 9)]`; by default all over 1x1.
        batches: inputs of the model, needed for convolutions that no norm follows: the new branches' statistics are
            measured on them, and the main branch is what is left of the convolution without the others. The function is
            then unchanged in eval mode; in train mode the new norms take each batch's own statistics.
        mode: "online": the branches have scales for norms and are folded in each forward, and the convolution's own norm
            stands behind their sum. "gradient": the convolution stays alone, with the masks of such branches for RepSGD
            and RepAdamW. Both keep the function in train mode too.
        inplace: change `model` itself; it stays whole where this is refused.
        options: arguments of the block, such as `n=2` for MobileOneBlock.

    Raises:
        ExpandError: an unknown block or mode, one that can't keep the function, a pattern that matches nothing, or a layer
            that can't be expanded, with its path and the reason.
    """
    cls = _block_class(block)
    try:
        checked(mode)
    except ValueError as error:
        raise ExpandError(str(error)) from error
    if batches is not None:
        batches = [batches] if isinstance(batches, torch.Tensor) else list(batches)
    norms = norms_behind(model)
    chosen, certain = choose(plain_convs(model), norms, layers, kernels, without_norm=batches is not None)
    if not inplace:
        model = copy.deepcopy(model)
    plans: list[_Plan | _Masking] = []
    known: dict[Any, Masks | None] = {}
    reasons: dict[str, str] = {}
    for path in chosen:
        try:
            if mode == GRADIENT:
                plans.append(_masking(model, path, cls, options, known))
            else:
                plans.append(_plan(model, path, norms.get(path, ""), cls, options, mode, known))
        except ExpandError as error:
            if path in certain:
                raise ExpandError(f"{path}: {error}; nothing was changed") from error
            reasons[path] = str(error)
    if not plans:
        path, reason = next(iter(reasons.items()))
        raise ExpandError(f"{cls.__name__} fits none of the {len(reasons)} convolutions; {path}: {reason}")
    if batches is not None:
        _calibrate(model, [plan for plan in plans if isinstance(plan, _Plan) and not plan.norm], batches)
    for plan in plans:
        model = plan.placed(model)
    return model


def collapse(model: nn.Module) -> nn.Module:
    """Put, in place, each main branch's convolution and norm back where they stood, and drop the other branches.

    This keeps the function only while these are silent; `fuse` keeps it always.
    """
    for path, layer in [*model.named_modules()]:
        if not isinstance(layer, Expanded):
            continue
        if layer.norm_here:
            parent = path.rpartition(".")[0].replace(".", "/")
            norm = posixpath.normpath(posixpath.join(parent, layer.norm_there)).replace("/", ".")
            model.set_submodule(norm, layer.get_submodule(layer.norm_here))
        if not path:
            return layer.conv
        model.set_submodule(path, layer.conv)
    return model


# ---- one layer -----------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What takes the place of one convolution, complete but for calibration."""

    path: str
    norm: str
    conv: nn.Conv2d
    layer: Expanded
    branches: Parallel
    main: str
    spreads: list[float] = field(default_factory=list)  # of the convolution's output, one for each batch of a calibration

    def placed(self, model: nn.Module) -> nn.Module:
        """The model with the layer where the convolution stood, and its norm inside."""
        if self.norm:
            model.set_submodule(self.norm, nn.Identity().train(self.layer.training))
        if not self.path:
            return self.layer
        model.set_submodule(self.path, self.layer)
        return model


@dataclass
class _Masking:
    """What the gradient form of one convolution takes."""

    conv: nn.Conv2d
    masks: Masks

    def placed(self, model: nn.Module) -> nn.Module:
        """The model with the masks on the convolution."""
        mask(self.conv, self.masks)
        return model


def _masking(model: nn.Module, path: str, cls: type[nn.Module], options: Any, known: dict[Any, Masks | None]) -> _Masking:
    conv: Any = model.get_submodule(path)
    masks = known.get(key := _shape(conv))
    if masks is None:
        made = _made(conv, cls, options)
        _check_fold(made, conv)
        try:
            total, _ = _sum_and_norm(FORMS[ONLINE](made))  # type: ignore[arg-type]
            masks = known[key] = masks_of(total.branches if isinstance(total, Online) else total)
        except FoldError as error:
            raise ExpandError(f"{cls.__name__} {error}") from error
    return _Masking(conv, masks)


def _shape(conv: nn.Conv2d) -> Any:
    return conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups


def _block_class(block: str | type[nn.Module]) -> type[nn.Module]:
    if isinstance(block, type) and issubclass(block, nn.Module):
        return block
    try:
        return layer_named(str(block)).cls
    except ValueError as error:
        raise ExpandError(str(error)) from error


def _plan(
    model: nn.Module, path: str, norm_path: str, cls: type[nn.Module], options: Any, mode: str, known: dict[Any, Any]
) -> _Plan:
    """`known` holds the shapes of convolutions that the block is known to fold to."""
    conv: Any = model.get_submodule(path)
    norm: Any = model.get_submodule(norm_path) if norm_path else None
    plain_mode = conv.training
    made = _made(conv, cls, options)
    if (shape := _shape(conv)) not in known:
        _check_fold(made, conv)
        known[shape] = None
    try:
        FORMS[mode](made, inplace=True)
    except FoldError as error:
        raise ExpandError(f"{cls.__name__}: {error}") from error
    total, outer = _sum_and_norm(made)
    branches = total.branches if isinstance(total, Online) else total
    if not isinstance(branches, Parallel):
        raise ExpandError(f"{cls.__name__} is not one sum of branches, so it can't stand for one convolution")
    (main, first), *others = branches.items()
    if outer is not None and any(isinstance(module, nn.BatchNorm2d) for module in first.modules()):
        raise ExpandError(
            f"{cls.__name__} normalizes its {main} branch and again behind the sum, so it can't keep the function in train "
            "mode; take a block with one norm on that way, such as RepConv or DiverseBranchBlock"
        )
    for name, branch in others:
        silence(branch, f"{cls.__name__}'s branch {name}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    inner = norm if outer is None else None
    if inner is not None:
        layers["bn"] = inner
    scales = [(name, child) for name, child in first.named_children() if isinstance(child, Scale)]
    for name, scale in scales:
        nn.init.ones_(scale.alpha)
        layers[name] = scale
    if norm is not None:
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = norm.eps, norm.momentum
        if isinstance(norm, nn.SyncBatchNorm):  # the new branches see the same batch as the main one
            nn.SyncBatchNorm.convert_sync_batchnorm(total, norm.process_group)
    branches._modules[main] = nn.Sequential(layers)
    where = f"sum.branches.{main}" if isinstance(total, Online) else f"sum.{main}"
    children: OrderedDict[str, nn.Module] = OrderedDict(sum=total)
    here = ""
    if norm is not None:
        here = f"{where}.bn" if outer is None else "bn"
        if outer is not None:
            children["bn"] = norm
    parent = path.rpartition(".")[0].replace(".", "/")
    there = posixpath.relpath(norm_path.replace(".", "/"), parent or ".") if norm_path else ""
    expanded = Expanded(children, where, here, there)
    expanded.train(conv.training if norm is None else norm.training)
    conv.training = plain_mode
    return _Plan(path, norm_path, conv, expanded, branches, main)


def _check_fold(made: Block, conv: nn.Conv2d) -> None:
    """Refuse a block that does not fold to the convolution which it is to stand for, before a training is spent on it."""
    name, wanted = type(made).__name__, AffineConv.from_conv(conv)
    try:
        with torch.no_grad():
            found = equivalent(made.affine_part)
    except FoldError as error:
        raise ExpandError(f"{name} does not fold to one convolution: {error}") from error
    for what in ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels"):
        a, b = getattr(found, what), getattr(wanted, what)
        if a != b and not (what == "dilation" and wanted.kernel_size == (1, 1)):
            raise ExpandError(f"{name} folds to a convolution of {what} {a}, where this one has {b}")


def _made(conv: nn.Conv2d, cls: type[nn.Module], options: dict[str, Any]) -> Block:
    """The block that stands for a convolution, without activation, on its device and in its dtype and mode."""
    try:
        value = AffineConv.from_conv(conv)
    except AlgebraError as error:
        raise ExpandError(str(error)) from error
    given = dict(k=value.kernel_size, s=value.stride, p=value.padding, d=value.dilation, g=value.groups, act=False)
    taken = inspect.signature(cls).parameters
    if "d" not in taken and value.dilation == (1, 1):
        del given["d"]
    if missing := [name for name in given if name not in taken]:
        raise ExpandError(
            f"{cls.__name__} takes no {', '.join(missing)}, so it can't stand for one convolution of any shape; it is a "
            "stage or a layer of its own"
        )
    if unknown := [name for name in options if name not in taken or name in given]:
        accepted = [name for name in taken if name not in (*given, "c1", "c2")]
        raise ExpandError(
            f"option {unknown[0]!r} of {cls.__name__} is not accepted here; accepted are {', '.join(accepted) or 'none'}"
        )
    try:
        with torch.device(conv.weight.device):
            made = cls(value.in_channels, value.out_channels, **given, **options)
    except (ValueError, TypeError) as error:
        raise ExpandError(str(error)) from error
    if not isinstance(made, Block) or any(type(m) is not nn.Identity for m in list(made.children())[1:]):
        raise ExpandError(f"{cls.__name__} is more than a sum of branches here, so it can't stand for one convolution")
    return made.to(conv.weight.dtype).train(conv.training)


def _sum_and_norm(block: Block) -> tuple[nn.Module, nn.Module | None]:
    part = block.affine_part
    if type(part) is nn.Sequential and len(part) == 2 and isinstance(part[1], nn.BatchNorm2d):
        return part[0], part[1]
    return part, None


def silence(branch: nn.Module, what: str) -> None:
    """Start a branch at zero by its last norm or scale."""
    last = _last(branch)
    if isinstance(last, nn.BatchNorm2d):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    elif isinstance(last, Scale):
        nn.init.zeros_(last.alpha)
    else:
        raise ExpandError(f"{what} ends in {type(last).__name__}, which can't start at zero; a norm or a Scale can")


def _last(branch: nn.Module) -> nn.Module:
    while isinstance(branch, nn.Sequential) and len(branch):
        branch = branch[-1]
    return branch


# ---- convolutions without a norm -----------------------------------------------------------------------------------------


def _calibrate(model: nn.Module, plans: list[_Plan], batches: list[Any]) -> None:
    """Measure the new norms' statistics where the model stands, then take the new branches out of each main one."""
    if plans and not batches:
        raise ExpandError("batches is empty; give at least one input of the model")
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        for plan in plans:
            others = nn.ModuleList(branch for name, branch in plan.branches.items() if name != plan.main)
            for norm in _norms(others):
                norm.momentum = None  # the mean over all batches
                nn.init.ones_(norm.weight)
            handles.append(plan.conv.register_forward_hook(_feeding(others, plan.spreads)))
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    for plan in plans:
        _subtract(plan)


def _norms(modules: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in modules.modules() if isinstance(module, nn.BatchNorm2d)]


def _feeding(others: nn.ModuleList, spreads: list[float]) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def hook(conv: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        spreads.append(float(output.double().std((0, 2, 3), unbiased=False).median()))
        for branch in others:
            branch.train()
            branch(inputs[0])

    return hook


def _subtract(plan: _Plan) -> None:
    others = {name: branch for name, branch in plan.branches.items() if name != plan.main}
    for norm in _norms(nn.ModuleList(others.values())):
        norm.momentum = 0.1
        assert norm.running_var is not None
        # a channel that is constant in the batches would be amplified by 1 / sqrt(eps), and rounding with it
        floor = norm.running_var.median() * QUIET
        norm.running_var.clamp_(min=float(floor) if floor > 0 else 1.0)
    share = SHARE * sum(plan.spreads) / max(len(plan.spreads), 1)
    for branch in others.values():
        branch.eval()
        if isinstance(last := _last(branch), nn.BatchNorm2d):
            nn.init.constant_(last.weight, share or SHARE)
    if others:
        minus = torch.full((1,), -1.0, dtype=torch.float64)
        rest = in_float64(plan.conv) + in_float64(Parallel(others)).scaled(minus)
        made = rest.to(plan.conv.weight.dtype).to_conv().to(plan.conv.weight.device)
        plan.branches.get_submodule(plan.main)._modules["conv"] = made
    plan.layer.train(plan.conv.training)

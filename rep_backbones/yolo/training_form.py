"""The form in which a model's branches are trained: in its YAML, on the command line, and when weights are loaded.

    mode: online                                             # of a whole model YAML, at the top
    - [-1, 1, RepVGGBlock, [64, 3, 2, {mode: online}]]       # of one row; "branches" where the model has another
    rep-yolo train ... branches=online
    rep-yolo train ... optimizer=RepSGD scales=runs/detect/search/weights/best.pt

It is written into the model's YAML, which a training, resumed or on several GPUs, builds the model from.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.nn.tasks import BaseModel, yaml_model_load
from ultralytics.utils import LOGGER

from rep_backbones import gradient_form, online_form
from rep_backbones.containers import Block
from rep_backbones.gradient_form import BUFFERS, masked
from rep_backbones.rep_optimizers import OPTIMIZERS
from rep_backbones.rules import multi_branch
from rep_backbones.training_forms import BRANCHES, GRADIENT, ONLINE, checked, has_form

KEY = "mode"  # of a model YAML, and of a row


def of_yaml(config: Mapping[str, Any]) -> str:
    """The form that a model YAML asks for as a whole.

    Raises:
        ValueError: an unknown one.
    """
    return checked(config.get(KEY), "model YAML: ")


def of_row(kwargs: dict[str, Any], taken: Container[str]) -> str | None:
    """Take the form out of a row's keywords; None where it has none, or where the layer takes `mode` itself.

    Raises:
        ValueError: an unknown one.
    """
    return None if KEY in taken or KEY not in kwargs else checked(kwargs.pop(KEY))


def in_form(layer: nn.Module, own: str | None, whole: str) -> nn.Module:
    """A layer of a row in the row's own form, or in that of the whole model where it has branches.

    Raises:
        FoldError: the layer has no such form.
    """
    mode = whole if own is None else own
    if mode == BRANCHES or (own is None and not multi_branch(layer)):
        return layer
    change = online_form.to_online if mode == ONLINE else gradient_form.to_gradient
    return change(layer, inplace=True)


def refuse_unused(layers: nn.Module, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a whole YAML asks for a form that none of its layers has."""
    if not has_form(layers, mode := of_yaml(config)):
        raise ValueError(
            f"model YAML: mode: {mode}: no row has branches, so nothing would be trained so. Name a layer such as "
            "RepVGGBlock, or give `expand:` too"
        )


def to_online(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """`rep_backbones.online_form.to_online`, which see; an Ultralytics model notes it in its YAML, for `YOLO.train`."""
    return _noted(model, ONLINE, online_form.to_online, inplace)


def to_gradient(model: nn.Module, *, scales: nn.Module | None = None, inplace: bool = False) -> nn.Module:
    """`rep_backbones.gradient_form.to_gradient`, which see; an Ultralytics model notes it in its YAML, for `YOLO.train`."""
    scales = scales.model if isinstance(scales, Model) else scales  # type: ignore[assignment]
    return _noted(model, GRADIENT, lambda m, inplace: gradient_form.to_gradient(m, scales=scales, inplace=inplace), inplace)


def _noted(model: nn.Module, mode: str, change: Any, inplace: bool) -> nn.Module:
    if isinstance(model, Model):
        whole = model if inplace else deepcopy(model)
        whole.model = _noted(whole.model, mode, change, True)  # type: ignore[arg-type,assignment]
        return whole
    changed = change(model, inplace=inplace)
    if isinstance(changed, BaseModel):
        vars(changed)["yaml"] = {**changed.yaml, KEY: mode}  # type: ignore[dict-item]
    return changed


# ---- a training ----------------------------------------------------------------------------------------------------------


def config_for(given: Any, keys: Mapping[str, Any], optimizer: Any) -> Any:
    """The model YAML of a training, a mapping or a name, in the form that its arguments ask for.

    Raises:
        ValueError: arguments that exclude each other, or the YAML's own form.
    """
    asked = keys["branches"]
    if stock_of(optimizer) is not None:
        if asked == ONLINE:
            raise ValueError(f"branches=online and optimizer={optimizer} exclude each other: a model has one form")
        asked = GRADIENT
    if asked == "model":
        return given
    config = dict(given) if isinstance(given, Mapping) else yaml_model_load(given)
    if config.get(KEY) not in (None, asked):
        raise ValueError(f"the model's YAML has mode: {config[KEY]}, and {asked} is asked for; leave one of them out")
    return {**config, KEY: asked}


def stock_of(optimizer: Any) -> str | None:
    """The name of the stock optimizer that one of ours is made from; None for all others."""
    return next((cls.__base__.__name__ for cls in OPTIMIZERS if cls.__name__.lower() == str(optimizer).lower()), None)  # type: ignore[union-attr]


def rep_optimizer(name: str, stock: Any, model: nn.Module) -> Any:
    """Our optimizer with the groups of the stock one."""
    cls = next(cls for cls in OPTIMIZERS if cls.__name__.lower() == name.lower())
    LOGGER.info(f"{cls.__name__}: {sum(1 for _ in masked(model))} layers learn as their branches would")
    return cls(stock.param_groups, model=model)


def refuse_without_masks(optimizer: Any, model: nn.Module) -> None:
    """Raises ValueError if a stock optimizer is to train a model in the gradient form."""
    if path := next((path for path, _, _ in masked(model)), None):
        raise ValueError(
            f"optimizer={optimizer} would train {path} as a plain layer, whose branches are in its gradient; give "
            f"optimizer={' or '.join(cls.__name__ for cls in OPTIMIZERS)}, or leave `mode: gradient` out"
        )


def adopt_scales(model: Any, search: nn.Module, weights: bool) -> None:
    """The constants of a model in the gradient form, from the learned scales of one in the online form, in place.

    Args:
        weights: take the kernels that the branches have with these scales, too.

    Raises:
        ValueError, FoldError: the two have other layers.
    """
    online = {**deepcopy(model.yaml), KEY: ONLINE}
    layers, _ = tasks.parse_model(online, ch=online.get("channels", 3), verbose=False)
    whole = nn.ModuleDict({"model": layers})
    gradient_form.to_gradient(whole, scales=search, inplace=True)
    taken = {f"{path}.{name}" for path, _, _ in masked(whole) for name in (*BUFFERS, *(["weight"] if weights else []))}
    state = {name: value for name, value in whole.state_dict().items() if name in taken}
    model.load_state_dict(state, strict=False)


# ---- weights -------------------------------------------------------------------------------------------------------------


def fitting(model: nn.Module, weights: nn.Module) -> nn.Module:
    """Weights in the form of the model that they are to be loaded into: themselves, or a copy of branches made online.

    Raises:
        ValueError: layers in another form, whose weights would be left out by name; with the layers.
    """
    there = dict(weights.named_modules())
    differing = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, Block)
        and isinstance(other := there.get(path), Block)
        and _names(layer.affine_part) != _names(other.affine_part)
    }
    if not differing:
        return weights
    if all(has_form(layer, ONLINE) and not has_form(there[path], ONLINE) for path, layer in differing.items()):
        weights = deepcopy(weights)
        for path in differing:
            online_form.to_online(weights.get_submodule(path), inplace=True)
        return fitting(model, weights)
    path = next(iter(differing))
    raise ValueError(
        f"cannot load weights into layers of another training form: {path} and {len(differing) - 1} more have other "
        "parameters there. Train in the form that the weights have (the same branches=, optimizer= or `mode:`), or start "
        "anew with pretrained=False; branches alone can go on online, with branches=online"
    )


def _names(part: nn.Module) -> set[str]:
    return {name for name in part.state_dict() if name.rpartition(".")[2] not in BUFFERS}

"""`expand` for Ultralytics: the key of a model YAML, the models themselves, and plain weights for an expanded model.

What an expansion did is written into the model's YAML, so that training, resume and the workers of several GPUs, which all
build the model from its YAML, get the same one.

    expand: DiverseBranchBlock
    expand: {block: MobileOneBlock, n: 2, layers: ["model.2.*", "model.23.*"], kernels: [3]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import LOGGER

from rep_backbones.candidates import ExpandError, Kernels, Layers
from rep_backbones.containers import Block
from rep_backbones.expand import Expanded, collapse
from rep_backbones.expand import expand as expand_any
from rep_backbones.gradient_form import masked, unmask
from rep_backbones.registry import LAYERS
from rep_backbones.training_forms import BRANCHES
from rep_backbones.yolo import training_form

KEY = "expand"
CALIBRATED = "calibrated"  # marks, in the note of a model, what was measured on batches and no YAML can build anew


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
    """A copy of a model, any nn.Module or an Ultralytics one, with branches beside its plain convolutions.

    The arguments and errors of `rep_backbones.expand.expand`. An Ultralytics model notes it in its YAML, so that
    `YOLO.train`, which builds the model anew, trains the same branches.
    """
    asked: dict[str, Any] = dict(layers=layers, kernels=kernels, batches=batches, mode=mode, **options)
    if isinstance(model, Model):
        whole = model if inplace else deepcopy(model)
        whole.model = expand(whole.model, block, inplace=True, **asked)  # type: ignore[arg-type,assignment]
        return whole
    if not isinstance(model, BaseModel):
        return expand_any(model, block, inplace=inplace, **asked)
    name = next((name for name, layer in LAYERS.items() if block in (name, layer.cls)), None)
    if name is None and not isinstance(block, str):
        raise ExpandError(f"{block!r} is not registered, so a training could not build it: rep_backbones.register_layer it")
    model = model if inplace else deepcopy(model)
    before = set(_paths(model))
    expand_any(model, block, inplace=True, **asked)
    new = {path: normed for path, normed in _paths(model).items() if path not in before}
    config: Any = model.yaml
    notes, how = [*requests(config)], {"block": name, **options}
    if mode != training_form.of_yaml(config):
        how[training_form.KEY] = mode
    if normed := [path for path, has_norm in new.items() if has_norm]:
        notes.append({**how, "layers": normed})
    if bare := [path for path, has_norm in new.items() if not has_norm]:
        notes.append({**how, "layers": bare, CALIBRATED: True})
    vars(model)["yaml"] = {**config, KEY: notes}
    return model


def requests(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What the key `expand` of a model YAML asks for: the keyword arguments of one expansion after the other.

    Raises:
        ValueError: for anything but a block's name, a mapping with `block`, or a list of these.
    """
    given = config.get(KEY) or []
    found = []
    for item in given if isinstance(given, (list, tuple)) else [given]:
        request = {"block": item} if isinstance(item, str) else item
        named = isinstance(request, dict) and all(isinstance(key, str) for key in request)
        if not named or not isinstance(request.get("block"), str) or request.keys() & {"batches", "inplace"}:
            raise ValueError(
                f"model YAML: `expand: {given}` is not accepted; accepted are the name of a block, such as "
                "DiverseBranchBlock, or a mapping {block: its name, layers: [...], kernels: [...], and the block's options}"
            )
        found.append(dict(request))
    return found


def expanded_layers(layers: nn.Sequential, config: dict[str, Any], verbose: bool) -> nn.Sequential:
    """The layers of a parsed YAML, expanded as its key asks for.

    Raises:
        ValueError: what `expand` refuses, with the key.
    """
    for request in requests(config):
        whole = nn.ModuleDict({"model": layers})  # the names of the model that the layers will be part of
        if request.pop(CALIBRATED, False):
            raise ValueError(
                f"this model was expanded by {request['block']} without norms, its branches measured on batches; a training "
                "that builds the model anew from its YAML would lose them. Expand it before it is fused, or train it in a "
                "loop of your own"
            )
        block, options = request["block"], {key: value for key, value in request.items() if key != "block"}
        options.setdefault(training_form.KEY, training_form.of_yaml(config))
        if "kernels" in options and not isinstance(options["kernels"], int):
            options["kernels"] = [tuple(k) if isinstance(k, list) else k for k in options["kernels"]]
        before = len(_paths(whole))
        try:
            expand_any(whole, block, inplace=True, **options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"model YAML: expand: {block}: {error}") from error
        for layer in layers:
            layer.np = sum(parameter.numel() for parameter in layer.parameters())  # type: ignore[assignment]
        if verbose:
            LOGGER.info(f"expand: {block} in the place of {len(_paths(whole)) - before} convolutions")
    training_form.refuse_unused(layers, config)
    return layers


def has_expanded(model: nn.Module) -> bool:
    """Whether a model holds an expanded convolution."""
    return any(isinstance(module, Expanded) for module in model.modules())


def load_plain(load: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a plain model's weights into an expanded one: all of them, by Ultralytics' own rules.

    The branches of `model` are dropped, the plain weights loaded, and the branches made anew, silent.
    """
    collapse(model)
    for conv in _masked_alone(model).values():
        unmask(conv)
    try:
        return load(model, *args, **kwargs)
    finally:
        expanded_layers(model.model, model.yaml, verbose=False)


def _paths(model: nn.Module) -> dict[str, bool]:
    """The convolutions that were expanded, in any form, and whether no calibration was needed for them."""
    found = {path: bool(module.norm_here) for path, module in model.named_modules() if isinstance(module, Expanded)}
    return found | dict.fromkeys(_masked_alone(model), True)


def _masked_alone(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions that `expand` has left alone with masks; those of a block in the gradient form are the block's."""
    inside = {part for module in model.modules() if isinstance(module, Block) for part in module.modules()}
    return {path: conv for path, conv, _ in masked(model) if conv not in inside}

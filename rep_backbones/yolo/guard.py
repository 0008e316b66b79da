"""Refuses to train from fused weights, where Ultralytics would copy a part of them and say nothing.

`YOLO.train` builds the model anew from its YAML and copies the weights that match by name. Of a fused model these are merged
kernels in the place of one branch's, and nothing for the other branches and the norms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks

from rep_backbones.rules import multi_branch
from rep_backbones.yolo.expanding import has_expanded, load_plain
from rep_backbones.yolo.pretrained import Pretrained
from rep_backbones.yolo.training_form import fitting

SHOWN = 5  # names in a message
REMEDY = (
    "Start from best.pt (not best_deploy.pt), loaded anew: YOLO('best.pt').train(...). fuse() merges a loaded model in "
    "place, and so do val() and predict() of Ultralytics up to 8.4.100. To train from scratch instead, give pretrained=False"
)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def refuse_fused(model: nn.Module, weights: nn.Module) -> None:
    """Raises ValueError, with the layers and the remedy, if `weights` are of a fused model and are to train as `model`.

    Args:
        model: built from its YAML; may be `weights` itself, and then its YAML says which branches it should have.
        weights: the model whose weights are copied into it, by name.
    """
    if lost := merged_layers(model, weights):
        raise ValueError(
            f"cannot train from the weights of a fused model: the branches of {len(lost)} layers are merged into one "
            f"convolution each, in {some(lost)}. {REMEDY}."
        )


def merged_layers(model: nn.Module, weights: nn.Module) -> list[str]:
    """The layers ("path (type)") that have branches in `model`, where `weights` have a merged convolution."""
    built = _rebuilt(model) if model is weights else model
    if built is None:
        return []
    there = dict(weights.named_modules())
    return [f"{path} ({type(layer).__name__})" for path, layer, _ in multi_branch(built) if _is_merged(_at(there, path))]


def guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseModel.load` that refuses fused weights for a model with branches, and loads plain ones into an expanded model."""

    @functools.wraps(load)
    def guarded_load(self: nn.Module, weights: Any, *args: Any, **kwargs: Any) -> Any:
        given = (weights.get("ema") or weights.get("model")) if isinstance(weights, dict) else weights
        if isinstance(given, Pretrained):
            return load_plain(_load_pretrained, self, given) if has_expanded(self) else _load_pretrained(self, given)
        if isinstance(given, nn.Module):
            refuse_fused(self, given)
            if has_expanded(given) and not has_expanded(self):
                raise ValueError(
                    "cannot load the weights of an expanded model into a plain one: its branches would be lost. "
                    "Fuse it first, or give the model YAML the same `expand:`"
                )
            if has_expanded(self) and not has_expanded(given):
                return load_plain(load, self, weights, *args, **kwargs)
            if (fit := fitting(self, given)) is not given:
                weights = fit
        return load(self, weights, *args, **kwargs)

    return guarded_load


def _load_pretrained(model: nn.Module, weights: Pretrained) -> None:
    weights.into(model)


def some(names: Sequence[str]) -> str:
    """The first names of a list for a message, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _at(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """What stands at `path`, or at the row that it belongs to: a merged layer within a stage may have another path."""
    while path.count(".") > 1 and path not in modules:
        path = path.rpartition(".")[0]
    return modules.get(path)


def _is_merged(module: nn.Module | None) -> bool:
    """Convolutions with a bias and no norms: what is left of a layer that trained with norms."""
    parts = list(module.modules()) if module is not None else []
    biases = [part.bias is not None for part in parts if isinstance(part, nn.modules.conv._ConvNd)]
    return bool(biases) and all(biases) and not any(isinstance(part, _NORMS) for part in parts)


def _rebuilt(model: nn.Module) -> nn.Module | None:
    """The layers that the model's YAML declares, on the meta device, under the model's names; None if it has no YAML."""
    declared = getattr(model, "yaml", None)
    if not isinstance(declared, dict) or "backbone" not in declared:
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        layers, _ = tasks.parse_model(deepcopy(declared), ch=declared.get("channels", 3), verbose=False)
    return nn.ModuleDict({"model": layers})

"""load_weights(): published weights into a model of ours, every tensor accounted for."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from rep_backbones.weights.errors import WeightsError
from rep_backbones.weights.files import Source, tensors_of
from rep_backbones.weights.formats import OURS, Format, format_of
from rep_backbones.weights.plan import Plan, gaps, plan_by_key, plan_by_row, plan_in_order
from rep_backbones.weights.report import Report, listed
from rep_backbones.weights.units import units_of_file, units_of_model


def load_weights(model: nn.Module, source: Source, strict: bool = True) -> Report:
    """Put the weights of a file into a model, in place: of its authors' code, of timm, or of this package.

    What the file holds is told by the names in it (`weights.formats`), and its layers meet the model's in the order in which
    they run. Training and deployed form go into each other: branches are merged as by `fuse`; a merged convolution becomes
    the main branch and the others start silent, which computes the same in eval (docs/weights.md says what that is to a
    training). The model's own eps is kept: where the file's norms had another, their weights make up for it.

    Args:
        model: a backbone, or an Ultralytics model (`YOLO(...).model`) whose first rows the file is for; any form, dtype and
            device.
        source: the path of a file (.pt, .pth, .pth.tar, .bin, .safetensors), or a state dict. A file is read as weights
            only: nothing in it is executed.
        strict: refuse what does not fit. Without, what fits is loaded and the report names the rest.

    Returns:
        A report of each tensor that was loaded, was not used, or is not in the file. With `strict` the last two are whole
        parts: a last layer where the model has none, another code's head, rows of the model behind the file's last layer.

    Raises:
        WeightsError: a file that can't be read, names that are not known, tensors that are missing or of another shape.
            The model is then as it was.
        TypeError: for another kind of model or source.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights takes a torch.nn.Module, got {type(model).__name__}; of a YOLO(...) give its .model")
    tensors, name = tensors_of(source)
    state = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in state.values()):
        raise WeightsError("the model has no memory (device meta); build it on the CPU, or model.to_empty(device='cpu')")
    known = format_of(list(tensors))
    try:
        plan = _planned(model, state, tensors, known)
        if strict and plan.problems:
            more = f" (and {len(plan.problems) - 1} more)" if len(plan.problems) > 1 else ""
            raise WeightsError(f"{plan.problems[0]}{more}")
    except WeightsError as error:
        of = f"{name} ({known.name if known else OURS} names)"
        raise WeightsError(f"{of}: {error}. Nothing was changed; strict=False loads what fits") from error
    with torch.no_grad():
        for key, tensor in plan.values.items():
            state[key].copy_(tensor)
    return replace(plan.report(tensors, state), source=name, format=known.name if known else OURS)


def _planned(model: nn.Module, state: dict[str, Tensor], tensors: dict[str, Tensor], known: Format | None) -> Plan:
    plan = Plan()
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            plan.problems.append(f"{key} holds NaN or inf: the training has diverged, or the file is damaged")
    if known is None:
        plan_by_key(plan, units_of_model(model), state, tensors)
        return plan
    units, unknown = units_of_file(tensors, known)
    if names := [key for key in unknown if not re.fullmatch(known.unused, key)]:
        plan.problems.append(f"{len(names)} names are not known in this format: {listed(names)}")
    plan.problems += gaps(units, known)
    (plan_by_row if known.by_row else plan_in_order)(plan, units, units_of_model(model), tensors, known)
    return plan

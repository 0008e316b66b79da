"""The forms in which a layer with branches can be trained, by the names that model YAMLs and `expand` have for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rep_backbones.gradient_form import masked, to_gradient
from rep_backbones.online import Online
from rep_backbones.online_form import to_online

BRANCHES, ONLINE, GRADIENT = "branches", "online", "gradient"


def _as_it_is(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    return model


FORMS: dict[str, Callable[..., nn.Module]] = {BRANCHES: _as_it_is, ONLINE: to_online, GRADIENT: to_gradient}


def checked(mode: Any, where: str = "") -> str:
    """`mode`, if it is the name of a form; None is "branches".

    Raises:
        ValueError: with the names that are accepted.
    """
    mode = BRANCHES if mode is None else mode
    if not isinstance(mode, str) or mode not in FORMS:
        raise ValueError(f"{where}mode={mode!r} is unknown; accepted are {', '.join(FORMS)}")
    return mode


def has_form(model: nn.Module, mode: str) -> bool:
    """Whether a layer of the model is in the form; "branches" is always there."""
    if mode == ONLINE:
        return any(isinstance(module, Online) for module in model.modules())
    return mode == BRANCHES or any(True for _ in masked(model))

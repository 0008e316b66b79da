"""`load_weights` for Ultralytics: its models and checkpoints too, and `pretrained=` with a file of other people's weights.

Wherever Ultralytics loads a checkpoint to start from (`pretrained=`, `YOLO(...).load`), a file that holds weights alone,
which it would not take, is a `Pretrained`; `BaseModel.load` then hands it to `load_weights`. A model YAML may name the file
too, as `pretrained: weights.pth`: a training that builds its model from that YAML starts from it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import LOGGER

from rep_backbones.weights import Report, WeightsError
from rep_backbones.weights import load_weights as load_any
from rep_backbones.weights.files import SUFFIXES, Source, tensors_of
from rep_backbones.yolo.checkpoint import load_precise
from rep_backbones.yolo.described import described_weights
from rep_backbones.yolo.plain_data import Refused

KEY = "pretrained"  # of a model YAML


class Pretrained(nn.Module):
    """Weights alone, in the place of the model that Ultralytics takes weights from."""

    def __init__(self, path: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.pt_path = path
        self.tensors = tensors

    def into(self, model: nn.Module) -> Report:
        """Load them, and log what became of each tensor.

        Raises:
            WeightsError: as `load_weights`.
        """
        report = _named(self.pt_path, model, self.tensors)
        LOGGER.info(str(report))
        return report


def load_weights(model: Any, source: Source, strict: bool = True) -> Report:
    """Put pretrained weights into a model, in place; `rep_backbones.weights.load_weights`, which see.

    Args:
        model: also a `YOLO(...)`.
        source: also a checkpoint of Ultralytics, such as best.pt: it is rebuilt without executing it, with the FP32 weights
            beside it where there are some; or a whole model of YOLOv6 or YOLOv7, of which the tensors alone are read.
        strict: False loads what fits.

    Raises:
        WeightsError, TypeError: as there.
    """
    model = model.model if isinstance(model, Model) else model
    if not isinstance(source, (str, os.PathLike)):
        return load_any(model, source, strict)
    try:
        tensors, name = tensors_of(source)
    except WeightsError as error:
        try:
            tensors, name = _of_checkpoint(source, model), str(source)
        except Refused:
            found = _whole_model(source)
            if found is None:
                raise error from None
            tensors, name = found, str(source)
    return _named(name, model, tensors, strict)


def _of_checkpoint(source: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    found: Any = load_precise(source).model
    if isinstance(model, BaseModel) and model.is_fused() and not found.is_fused():
        found.fuse(verbose=False)  # here the eps of its norms is known
    return found.state_dict()  # type: ignore[no-any-return]


def _named(name: str, model: nn.Module, tensors: dict[str, Tensor], strict: bool = True) -> Report:
    try:
        return replace(load_any(model, tensors, strict), source=name)
    except WeightsError as error:
        raise WeightsError(str(error).replace("the state dict", name, 1)) from error


def holds_weights(path: Any) -> bool:
    """Whether a path is that of a file of weights alone."""
    return _weights_at(path) is not None


def _weights_at(path: Any) -> Pretrained | None:
    file = Path(str(path))
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        return None
    try:
        tensors: dict[str, Tensor] | None = tensors_of(file)[0]
    except WeightsError:
        tensors = _whole_model(file)
    return None if tensors is None else Pretrained(str(file), tensors)


def _whole_model(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    try:
        return described_weights(path)
    except Refused:
        return None


def knowing_weights(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Ultralytics' `load_checkpoint`, which gives a `Pretrained` for a file of weights alone."""

    @functools.wraps(load_checkpoint)
    def load(weight: Any, *args: Any, **kwargs: Any) -> Any:
        found = _weights_at(weight)
        return load_checkpoint(weight, *args, **kwargs) if found is None else (found, {"model": found})

    return load


def starting_from_yaml(setup_model: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's `setup_model` that heeds `pretrained:` in a model YAML, unless it is told other weights, or none."""

    @functools.wraps(setup_model)
    def setup(self: Any) -> Any:
        named, done = self.model, setup_model(self)
        built = isinstance(named, (str, os.PathLike)) and Path(named).suffix.lower() in (".yaml", ".yml")
        weights = self.model.yaml.get(KEY) if built and self.args.pretrained is True and not self.resume else None
        if weights is not None:
            self.model.load(engine_trainer.load_checkpoint(weights)[0])
        return done

    return setup

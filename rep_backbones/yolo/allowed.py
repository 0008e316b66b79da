"""The allow-list: every name that a checkpoint may refer to, and what becomes of it.

| what the file names                                      | what becomes of it                                        |
|----------------------------------------------------------|-----------------------------------------------------------|
| a layer: an nn.Module of torch.nn, ultralytics.nn, this  | described by name and attributes, then built by `rebuild` |
| package, or a module that registered a layer             |                                                           |
| losses, assigners, picture transforms                    | described, never looked up, dropped                       |
| `DATA` in unpickle.py: dictionaries, sets, tensors, ...  | the value                                                 |
| anything else                                            | the file is refused                                       |
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from rep_backbones.registry import KNOWN
from rep_backbones.yolo.plain_data import NAMESPACES, Global

LAYER_PACKAGES = ("torch.nn.modules", "ultralytics.nn.modules", "rep_backbones")
MODEL_PACKAGES = ("ultralytics.nn",)  # the models themselves, in ultralytics.nn.tasks; rebuild.MODELS says which of them
DROPPED_PACKAGES = (
    "ultralytics.utils.loss",
    "ultralytics.utils.tal",
    "ultralytics.data.augment",
    "torchvision.transforms",
    "numpy.dtypes",
)
DROPPED_NAMES = ("numpy.dtype",)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether the dotted `module` is one of `packages` or lies in one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer_packages() -> tuple[str, ...]:
    """Packages whose nn.Modules may be built: torch's, Ultralytics', ours, and the files that registered a layer."""
    return (*LAYER_PACKAGES, *(layer.cls.__module__ for layer in KNOWN.values()))


def module_class(name: Global) -> type[nn.Module] | None:
    """The nn.Module subclass called `name` in an allowed package, or None. Nothing is imported to find it.

    A name that another package merely imported (`rep_backbones.fuse.torch`) is not found: the class must be defined within.
    """
    packages = (*layer_packages(), *MODEL_PACKAGES)
    if not within(name.module, packages) or name.module not in sys.modules:
        return None
    found = vars(sys.modules[name.module]).get(name.name)
    if isinstance(found, type) and issubclass(found, nn.Module) and within(found.__module__, packages):
        return found
    return None


def is_dropped(name: Global) -> bool:
    """Whether objects of the class `name` may stand in the file, and are never looked at."""
    return within(name.module, DROPPED_PACKAGES) or str(name) in DROPPED_NAMES


def is_described(name: Global) -> bool:
    """Whether objects of the class `name` may stand in the file, as descriptions."""
    return is_dropped(name) or str(name) in NAMESPACES or module_class(name) is not None

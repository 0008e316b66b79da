"""The tensors of a whole model that other people's code has pickled, read from its description (see `unpickle`).

YOLOv6 and YOLOv7 publish files that hold a model of classes which are not here. None of them is looked up, imported or made:
of each described module only its weights, its buffers and its children are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rep_backbones.yolo.allowed import within
from rep_backbones.yolo.checkpoint import existing
from rep_backbones.yolo.plain_data import MAX_DEPTH, Refused, Stored, StoredTensor
from rep_backbones.yolo.unpickle import Archive

PACKAGES = ("models", "yolov6")  # of WongKinYiu/yolov7, and of meituan/YOLOv6
MAX_LAYERS = 100_000


def described_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """What `state_dict()` of the model in a file gives, its averaged one where it has one; float32, on the CPU.

    Raises:
        Refused: for a file that holds something else, and for one that names anything but layers of PACKAGES, of torch.nn
            and plain data.
    """
    with Archive(existing(path)) as archive:
        contents = archive.contents(PACKAGES)
        if not isinstance(contents, dict):
            raise Refused(f"it holds a {type(contents).__name__}, where a dictionary with a model is accepted")
        root = contents.get("ema") if contents.get("ema") is not None else contents.get("model")
        if not isinstance(root, Stored) or not within(root.cls.module, PACKAGES):
            raise Refused(f"it holds no model of the packages {' and '.join(PACKAGES)}")
        layers = iter(range(MAX_LAYERS))
        return {name: archive.tensor(tensor) for name, tensor in _state(root, "", layers, 0)}


def _state(module: Any, prefix: str, layers: Iterator[int], depth: int) -> Iterator[tuple[str, StoredTensor]]:
    if not isinstance(module, Stored):
        raise Refused(f"its model has at {prefix[:-1]} what is no layer")
    if depth > MAX_DEPTH or next(layers, None) is None:
        raise Refused(f"its model has more than {MAX_LAYERS:,} layers, or layers nested more than {MAX_DEPTH} deep")
    attributes = module.attributes()
    hidden = attributes.get("_non_persistent_buffers_set", set())
    for kind in ("_parameters", "_buffers", "_modules"):
        held = attributes.get(kind, {})
        if not isinstance(held, dict) or not all(isinstance(name, str) and "." not in name for name in held):
            raise Refused(f"its model has no dictionary {kind} at {prefix[:-1]}")
        for name, value in held.items():
            if kind == "_modules" and value is not None:
                yield from _state(value, f"{prefix}{name}.", layers, depth + 1)
            elif isinstance(value, StoredTensor) and not (kind == "_buffers" and name in hidden):
                yield f"{prefix}{name}", value

"""Two graphs, run side by side by ONNX Runtime: do they compute the same, at the outputs and layer by layer?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from rep_backbones.export.onnx_model import RESOLUTION, session
from rep_backbones.verify import Report, verify

Array = np.ndarray[Any, Any]

SIZES = ((64, 64), (96, 160))  # height and width, in pixels, where a graph leaves them open
PICTURES = (1, 2)  # in a batch, where a graph leaves it open


def prove(
    reference: ModelProto, candidate: ModelProto, inner: Sequence[str] = (), *, size: tuple[int, int] | None = None
) -> Report:
    """Compare two graphs on random pictures, each output and each tensor of `inner` by its own range.

    Args:
        inner: names of tensors that both graphs have.
        size: (height, width) in pixels of pictures, where the graph leaves them open; by default two sizes are tried.

    Raises:
        ValueError: ONNX Runtime does not accept a graph, or fails on the pictures, with its reason.
    """
    given = _inputs(reference, size)
    before, after = (_runner(model, inner) for model in (reference, candidate))
    half = any(value.data_type == onnx.TensorProto.FLOAT16 for value in reference.graph.initializer)
    return verify(before, after, given, tolerance=2e-2 if half else 1e-5, resolution=RESOLUTION)


def _runner(model: ModelProto, inner: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Tensor]]:
    model = copy.deepcopy(model)
    shown = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in shown)
    try:
        run = session(model.SerializeToString())
    except Exception as error:  # protobuf and the runtime have an exception type each
        raise ValueError(f"ONNX Runtime does not accept the graph: {error}") from error
    names = [output.name for output in run.get_outputs()]

    def runner(pictures: Mapping[str, Array]) -> dict[str, Tensor]:
        try:
            found = run.run(None, dict(pictures))
        except Exception as error:  # the runtime's exceptions have no base of their own
            shapes = ", ".join(f"{name} {value.shape}" for name, value in pictures.items())
            raise ValueError(
                f"ONNX Runtime fails on {shapes}: {error}. Give the height and width that the model takes: --size 640 640"
            ) from error
        return {name: torch.from_numpy(value) for name, value in zip(names, found) if isinstance(value, np.ndarray)}

    return runner


def _inputs(model: ModelProto, size: tuple[int, int] | None) -> list[dict[str, Array]]:
    """Inputs of every size to try, by name."""
    stored = {value.name for value in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in stored]
    open_batch, open_size = (any(False in _fixed(value)[part] for value in given) for part in (slice(1), slice(2, 4)))
    sizes = [size] if size else list(SIZES) if open_size else [SIZES[0]]
    return [
        {value.name: _random(value, pictures, sides, seed) for value in given}
        for seed, (pictures, sides) in enumerate(product(PICTURES if open_batch else PICTURES[:1], sizes))
    ]


def _fixed(value: Any) -> list[bool]:
    return [dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim]


def _random(value: Any, pictures: int, sides: tuple[int, int], seed: int) -> Array:
    """Uniform between 0 and 1, as pictures are; whole numbers are 0 and 1."""
    kind = value.type.tensor_type
    wanted = (pictures, 3, *sides)
    dims = [dim.dim_value for dim in kind.shape.dim]
    shape = [dim if dim > 0 else (wanted[i] if i < len(wanted) else 1) for i, dim in enumerate(dims)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    numbers = np.random.default_rng(seed).random(shape)
    return numbers.astype(dtype) if np.issubdtype(dtype, np.floating) else (numbers > 0.5).astype(dtype)

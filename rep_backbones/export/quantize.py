"""INT8 as explicit QDQ in ONNX: symmetric int8, weights per output channel, zero points 0, as TensorRT takes it.

ONNX Runtime's quantizer does the mechanics. What is quantized are the inputs and weights of layers that multiply; everything
else (activations, the head's decode, biases) stays in float, which is where the collapse of the usual recipes comes from:
boxes reach 640 and scores end at 1, and one scale for both leaves nothing of the scores.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from rep_backbones.export.onnx_model import session

Array = np.ndarray[Any, Any]
Parts = Callable[[list[Array]], Mapping[str, Array]]  # outputs by name, each with a range of its own

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm")
# an export's own words for what calibrators do
METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "min-max": (CalibrationMethod.MinMax, {"symmetric": True}),
    "percentile 99.999": (CalibrationMethod.Percentile, {"symmetric": True, "percentile": 99.999}),
}
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(MULTIPLYING),
}
_SHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")


def layers(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that can be quantized, in order: all that multiply by a constant, but for the head's decode.

    A convolution that takes a softmax is the expectation over a box's distribution (DFL): its weights are 0, 1, 2 ... 15.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    constant = {value.name for value in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in MULTIPLYING and node.input[1] in constant and _source(node.input[0], makers) != "Softmax"
    ]


def _source(name: str, makers: Mapping[str, Any]) -> str:
    """The operator that a tensor comes from, looking through what only moves numbers."""
    while name in makers and makers[name].op_type in _SHAPING:
        name = makers[name].input[0]
    return makers[name].op_type if name in makers else ""


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes all have names, its initializers all kept apart: no kernel is shared by two layers."""
    model = copy.deepcopy(model)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def calibrated(model: onnx.ModelProto, pictures: Iterable[Array], method: str) -> TensorsData:
    """The range of each tensor that is quantized, over `pictures`, each `(n, c, h, w)` float32.

    One batch at a time goes through, and only its histograms stay.

    Raises:
        ValueError: without a picture, or for a tensor that is not finite.
    """
    kind, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        calibrator = create_calibrator(
            str(source),
            list(MULTIPLYING),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            extra_options=options,
        )
        calibrator.set_execution_providers(["CPUExecutionProvider"])
        name = model.graph.input[0].name
        count = 0
        for batch in pictures:
            with redirect_stdout(io.StringIO()):  # it prints a line for each
                calibrator.collect_data(_One({name: batch}))
            count += 1
        if not count:
            raise ValueError("calibration needs at least one picture, got none")
        with redirect_stdout(io.StringIO()):
            return calibrator.compute_data()


class _One(CalibrationDataReader):
    """One batch, for a calibrator that would hold the outputs of all that it reads."""

    def __init__(self, batch: dict[str, Array]) -> None:
        self._left = [batch]

    def get_next(self) -> dict[str, Array] | None:  # type: ignore[override]
        return self._left.pop() if self._left else None


def quantized(model: onnx.ModelProto, ranges: TensorsData, quantize: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model with the layers named in `quantize` in INT8, its metadata kept."""
    if not quantize:
        return copy.deepcopy(model)
    quantizer = QDQQuantizer(
        copy.deepcopy(model),
        True,  # per output channel
        False,
        QuantType.QInt8,
        QuantType.QInt8,
        ranges,
        list(quantize),
        [],
        list(MULTIPLYING),
        _OPTIONS,
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # as the standard of ONNX asks for, which ONNX Runtime does not insist on
    made = quantizer.model.model
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    return made


def tails(model: onnx.ModelProto) -> list[str]:
    """The outputs of the last layers, behind which nothing multiplies: the raw maps of a head, in front of its decode."""
    used: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            used.setdefault(name, []).append(node)
    last: dict[str, bool] = {}
    wanted = set(layers(model))
    for node in reversed(model.graph.node):  # in order: what is used comes later
        after = [user for name in node.output for user in used.get(name, [])]
        last[node.name] = not any(user.name in wanted or not last[user.name] for user in after)
    return [node.output[0] for node in model.graph.node if node.name in wanted and last[node.name]]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that gives these tensors instead of its outputs."""
    model = copy.deepcopy(model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


class Runner:
    """A model in memory on the CPU, `(n, c, h, w)` -> its outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._session = session(model.SerializeToString())
        self._input = self._session.get_inputs()[0].name

    def __call__(self, x: Array) -> list[Array]:
        return self._session.run(None, {self._input: x})


def sqnr(exact: Sequence[Mapping[str, Array]], found: Iterable[Mapping[str, Array]]) -> float:
    """Signal to quantization noise in decibels: 10 log10 of the power of the outputs over that of their errors.

    Each part of the outputs (boxes, scores) by itself, its mean taken off; the worst of them counts. Infinite without noise.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    means = {name: float(np.mean([parts[name].mean() for parts in exact])) for name in exact[0]}
    for a, b in zip(exact, found, strict=True):
        for name in a:
            signal[name] = signal.get(name, 0.0) + float(np.square(a[name] - means[name], dtype=np.float64).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(a[name] - b[name], dtype=np.float64).sum())
    return min(_decibels(signal[name], noise[name]) for name in signal)


def _decibels(signal: float, noise: float) -> float:
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))


def measured(model: onnx.ModelProto, exact: Sequence[Mapping[str, Array]], pictures: Sequence[Array], parts: Parts) -> float:
    """`sqnr` of a quantized model against what the float model gave for the same pictures."""
    run = Runner(model)
    return sqnr(exact, (parts(run(x)) for x in pictures))


def sensitivity(
    model: onnx.ModelProto,
    ranges: TensorsData,
    names: Sequence[str],
    pictures: Sequence[Array],
    parts: Parts,
) -> Iterator[tuple[str, float]]:
    """For each layer, the `sqnr` of the outputs where this layer alone is quantized: the lower, the more it does harm."""
    run = Runner(model)
    exact = [parts(run(x)) for x in pictures]
    for name in names:
        yield name, measured(quantized(model, ranges, [name]), exact, pictures, parts)

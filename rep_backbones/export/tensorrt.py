"""TensorRT: whether an engine can be built here, and how to build it elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from shlex import quote

import torch

# Operators marked as supported in ONNX-TensorRT's docs/operators.md for TensorRT 8.4, the oldest release still met in use.
SUPPORTED = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal
    Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GRU HardSigmoid Identity If ImageScaler InstanceNormalization IsNaN LeakyRelu Less LessOrEqual
    Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean Min Mod Mul Neg NonMaxSuppression Not Or
    Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomUniform RandomUniformLike Range ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RNN Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh
    Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Unsqueeze Upsample Where Xor
    """.split()
)


def unsupported(operators: Iterable[str]) -> list[str]:
    """Those of `operators` that TensorRT does not know, sorted."""
    return sorted(set(operators) - SUPPORTED)


def missing() -> str:
    """Why no engine can be built on this machine; empty if one can."""
    if not torch.cuda.is_available():
        return "no CUDA device is available to PyTorch"
    if importlib.util.find_spec("tensorrt") is None:
        return "the Python package tensorrt is not installed (pip install 'rep_backbones[tensorrt]')"
    return ""


def trtexec_line(
    onnx: str, engine: str, shape: Sequence[int], *, dynamic: bool = False, half: bool = False, minimum: int = 32
) -> str:
    """The command of NVIDIA's `trtexec` that builds `engine` from `onnx`.

    Args:
        shape: (n, c, h, w), the largest input; the only one unless `dynamic`.
        half: allow FP16. TensorRT 11 has no such flag, and takes the precision from the ONNX file.
        minimum: height and width of the smallest input where `dynamic`.
    """
    parts = ["trtexec", f"--onnx={quote(onnx)}", f"--saveEngine={quote(engine)}"]
    if dynamic:
        smallest = (1, shape[1], minimum, minimum)
        for key, value in (("min", smallest), ("opt", shape), ("max", shape)):
            parts.append(f"--{key}Shapes=images:{'x'.join(map(str, value))}")
    if half:
        parts.append("--fp16")
    return " ".join(parts)

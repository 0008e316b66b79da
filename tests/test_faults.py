"""Faults that are put into the fold and into the ONNX file: the proofs must find each, in every block and position.

The models have what makes a fault visible. Batch norms have random means, weights of both signs and biases, so that no
branch and no bias is zero; some variances are as small as eps, which then is half of what is divided by; inputs are noise of
odd height and width, so that an error at one border is not hidden by symmetry and H is not W; and the activation is SiLU,
since behind ReLU a wrong channel may be zero throughout.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_fuse_export import files, report, saved
from torch import nn
from yolo_helpers import spoiling

from rep_backbones import blocks, fuse, verify
from rep_backbones.containers import Parallel
from rep_backbones.verify import Mismatch
from rep_backbones.yolo.fuse_export_cli import main

fuse_module: Any = importlib.import_module("rep_backbones.fuse")  # the verb has the same name
REPORTS = ("best_deploy_report.json", "best_deploy_report.html")
Part = Any  # what folds to one convolution
Fold = Callable[[Part], nn.Conv2d]


# ---- faults of the fold: each makes a wrong convolution of a part --------------------------------------------------------


def _kernel_entry(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.weight.data[-1, 0, 0, 0] += 0.01 * conv.weight.abs().max()
    return conv


def _branch_dropped(fold: Fold, part: Part) -> nn.Conv2d:
    part = copy.deepcopy(part)
    for _, module in part.series:
        for parallel in (inner for inner in module.modules() if isinstance(inner, Parallel)):
            del parallel._modules[list(parallel._modules)[-1]]
            return fold(part)
    raise AssertionError("no branches")


def _wrong_padding(fold: Fold, part: Part) -> nn.Conv2d:
    """One tap off, as a kernel that was put into a larger one by its centre; the shape stays."""
    conv = fold(part)
    conv.weight.data = conv.weight.data.roll(1, dims=3)
    return conv


def _no_padding(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.padding = (0, 0)
    return conv


def _padded_otherwise(fold: Fold, part: Part) -> nn.Conv2d:
    """Right inside, wrong at the border only."""
    conv = fold(part)
    conv.padding_mode = "replicate"
    conv._reversed_padding_repeated_twice = [side for side in reversed(conv.padding) for _ in range(2)]
    return conv


def _height_and_width(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()
    return conv


def _eps(fold: Fold, part: Part) -> nn.Conv2d:
    part = copy.deepcopy(part)
    for _, module in part.series:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
    return fold(part)


def _bias(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.bias.data.zero_()
    return conv


def _one_bias(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.bias.data[-1] = 0
    return conv


def _stride(fold: Fold, part: Part) -> nn.Conv2d:
    conv = fold(part)
    conv.stride = (1, 1) if conv.stride != (1, 1) else (2, 2)
    return conv


FAULTS: dict[str, Callable[[Fold, Part], nn.Conv2d]] = {
    "a kernel entry changed": _kernel_entry,
    "a branch dropped": _branch_dropped,
    "wrong padding": _wrong_padding,
    "no padding": _no_padding,
    "another padding mode": _padded_otherwise,
    "swapped H and W": _height_and_width,
    "eps ignored": _eps,
    "a bias forgotten": _bias,
    "one channel's bias forgotten": _one_bias,
    "a stride lost": _stride,
}


def spoil(monkeypatch: pytest.MonkeyPatch, fault: str, position: int) -> list[str]:
    """Put the fault into the multi-branch layer of that number; gives the list of where it was put."""
    stock, met = fuse_module._fold, []
    spoilt: list[str] = []

    def fold(part: Part) -> nn.Conv2d:
        if not any(isinstance(inner, Parallel) for _, module in part.series for inner in module.modules()):
            return stock(part)
        met.append(part.path) if part.path not in met else None
        if met.index(part.path) != position:
            return stock(part)
        spoilt.append(part.path)
        return FAULTS[fault](stock, part)

    monkeypatch.setattr(fuse_module, "_fold", fold)
    return spoilt


def telling(model: nn.Module) -> nn.Module:
    """Statistics behind which no fault can hide; see the top."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                shape = norm.running_mean.shape
                norm.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
                norm.running_var.copy_(torch.rand(shape, generator=generator) + 0.3)
                norm.running_var[::2] = norm.eps
                # a norm that divides by the root of eps would drown all others
                norm.weight.copy_(
                    (torch.randn(shape, generator=generator) * 0.3 + 0.7) * (norm.running_var + norm.eps).sqrt()
                )
                norm.bias.copy_(torch.randn(shape, generator=generator) * 0.3)
    return model.eval()


BLOCKS = ["RepVGGBlock", "RepConv", "ACBlock", "DiverseBranchBlock", "MobileOneBlock", "QARepVGGBlock"]


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_it(fault: str, block: str, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cls = getattr(blocks, block)
    model = telling(nn.Sequential(cls(3, 8, 3, 2, act="SiLU"), cls(8, 8, 3, 1, act="SiLU"), cls(8, 6, 3, 2, act="SiLU")))
    x = torch.randn(2, 3, 29, 21, generator=torch.Generator().manual_seed(1))
    assert verify(model, fuse(model), [x]), "without the fault"
    spoilt = spoil(monkeypatch, fault, position)
    wrong = fuse(model)
    assert len(spoilt) == 1
    if fault in ("a stride lost", "no padding"):
        with pytest.raises(Mismatch):
            verify(model, wrong, [x])
    else:
        assert not verify(model, wrong, [x]).ok


@pytest.mark.parametrize("position", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_export_stops(
    fault: str, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved(tmp_path)
    content = torch.load(weights, weights_only=False)
    telling(content["model"].float())
    torch.save(content, weights)
    (tmp_path / "best_deploy.pt").write_bytes(b"the one before")
    spoilt = spoil(monkeypatch, fault, position)
    assert main([str(weights)]) == 3
    assert set(spoilt) == {["model.1", "model.2.0", "model.2.1", "model.3"][position]}
    assert files(tmp_path) == {"best.pt", "best_deploy.pt", "best_deploy.unproved.pt", *REPORTS}
    assert (tmp_path / "best_deploy.pt").read_bytes() == b"the one before"
    assert spoilt[0] in capsys.readouterr().err and "onnx" not in report(weights)["artifacts"]
    assert [layer["path"] for layer in report(weights)["layers"] if not layer["ok"]] == [spoilt[0]]


def test_a_fault_behind_an_activation_that_is_off_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pictures at hand the channel is zero behind its ReLU, with the fault as without it."""
    weights = saved(tmp_path)
    content = torch.load(weights, weights_only=False)
    layer = telling(content["model"].float()).model[1]
    for norm in (module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.bias.data[-1] = -5
    torch.save(content, weights)
    with monkeypatch.context() as alone:
        spoil(alone, "a kernel entry changed", 0)
        spoilt = fuse(layer)
    x = torch.rand(1, 16, 32, 32)
    assert torch.allclose(layer(x), spoilt(x), atol=1e-5), "nothing to be seen at the output"
    spoil(monkeypatch, "a kernel entry changed", 0)
    assert main([str(weights)]) == 3
    assert [found["path"] for found in report(weights)["layers"] if not found["ok"]] == ["model.1"]


# ---- faults of the ONNX file ---------------------------------------------------------------------------------------------


def _kernels(model: Any) -> list[Any]:
    return [value for value in model.graph.initializer if len(value.dims) == 4 and value.dims[2] == 3]


def _set(value: Any, numbers: np.ndarray) -> None:
    value.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(numbers), value.name))


def _one_weight(model: Any) -> None:
    numbers = onnx.numpy_helper.to_array(_kernels(model)[-1]).copy()
    numbers[0, 0, 0, 0] += 0.05 * abs(numbers).max()
    _set(_kernels(model)[-1], numbers)


def _transposed(model: Any) -> None:
    _set(_kernels(model)[1], onnx.numpy_helper.to_array(_kernels(model)[1]).transpose(0, 1, 3, 2))


def _no_bias(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    del conv.input[2]


def _node_removed(model: Any, operator: str) -> None:
    """What it gave is what it was given."""
    node = next(node for node in model.graph.node if node.op_type == operator)
    for other in model.graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = node.input[0]
    model.graph.node.remove(node)


def _left_dangling(model: Any) -> None:
    model.graph.node.remove(next(node for node in model.graph.node if node.op_type == "Conv"))


def _attribute(model: Any, name: str, values: list[int]) -> None:
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    attribute = next(entry for entry in convs[1].attribute if entry.name == name)
    del attribute.ints[:]
    attribute.ints.extend(values)


ONNX_FAULTS: dict[str, Callable[[Any], None]] = {
    "one weight changed": _one_weight,
    "a kernel transposed": _transposed,
    "a bias removed": _no_bias,
    "an activation removed": lambda model: _node_removed(model, "Relu"),
    "a node removed, its output still used": _left_dangling,
    "the padding moved": lambda model: _attribute(model, "pads", [2, 2, 0, 0]),
    "another stride": lambda model: _attribute(model, "strides", [1, 1]),
}


@pytest.mark.parametrize("fault", ONNX_FAULTS)
def test_the_onnx_proof_finds_it(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path, loud=True)
    (tmp_path / "best_deploy.onnx").write_bytes(b"the one before")

    def spoil(path: Path) -> None:
        model = onnx.load(path)
        ONNX_FAULTS[fault](model)
        onnx.save(model, path)

    spoiling(monkeypatch, "onnx", spoil)
    assert main([str(weights), "--format", "onnx"]) == 3
    assert files(tmp_path) == {
        *("best.pt", "best_deploy.pt", "best_deploy.onnx", "best_deploy.unproved.onnx"),
        *REPORTS,
    }
    assert (tmp_path / "best_deploy.onnx").read_bytes() == b"the one before"
    found = report(weights)
    assert found["artifacts"]["pt"]["proved"] and not found["artifacts"]["onnx"]["proved"]
    assert "best_deploy.onnx" in found["failures"][0]

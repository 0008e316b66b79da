"""INT8: the form of the graph, cures that are exact where they say so, the search, and fuse_export --int8 --data."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from test_fuse_export import files, report, saved
from torch import nn

from rep_backbones.export import cures, quantize, tensorrt
from rep_backbones.yolo import int8, shapes
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.fuse_export_cli import main


class Head(nn.Module):
    """Two layers with ReLU, one depthwise, a branch with SiLU, and a decode like DFL's: a convolution of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.expectation = nn.Conv2d(4, 1, 1, bias=False)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1)  # channels of very different ranges
            self.expectation.weight.copy_(torch.arange(4.0).reshape(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = nn.functional.silu(self.depthwise(x))
        return self.expectation(self.last(x).softmax(1))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    torch.onnx.export(Head().eval(), (torch.rand(1, 3, 16, 16),), path, dynamo=False, opset_version=18)
    return quantize.named(onnx.load(str(path)))


def pictures(count: int = 6) -> list[np.ndarray]:
    return [np.random.default_rng(seed).random((1, 3, 16, 16), dtype=np.float32) for seed in range(count)]


def whole(outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"all": outputs[0]}


def noise(exact: onnx.ModelProto, other: onnx.ModelProto) -> float:
    run = quantize.Runner(exact)
    return quantize.measured(other, [whole(run(x)) for x in pictures()], pictures(), whole)


def test_layers_are_those_that_multiply_but_for_the_decode(exact: onnx.ModelProto) -> None:
    assert len(quantize.layers(exact)) == 4 and not any("expectation" in name for name in quantize.layers(exact))
    (tail,) = quantize.tails(exact)
    assert next(node.name for node in exact.graph.node if tail in node.output) == quantize.layers(exact)[-1]


def test_the_graph_is_explicit_symmetric_and_per_channel(exact: onnx.ModelProto) -> None:
    ranges = quantize.calibrated(exact, pictures(), "min-max")
    made = quantize.quantized(exact, ranges, quantize.layers(exact))
    onnx.checker.check_model(made)
    values = {value.name: numpy_helper.to_array(value) for value in made.graph.initializer}
    pairs = [node for node in made.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 2 * 2 * 4, "a pair for the input and the kernel of each layer"
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any(), "zero points are 0"
    scales = sorted(values[node.input[1]].size for node in pairs if node.op_type == "QuantizeLinear")
    assert scales == [1, 1, 1, 1, 4, 8, 8, 8], "one scale for an input, one for each output channel of a kernel"
    assert not tensorrt.unsupported(node.op_type for node in made.graph.node)
    float_biases = [value for name, value in values.items() if "bias" in name and value.dtype == np.float32]
    assert len(float_biases) == 4
    assert 20 < noise(exact, made) < 80
    assert noise(exact, quantize.quantized(exact, ranges, [])) == float("inf")


def test_signal_to_noise_in_decibels() -> None:
    a = {"boxes": np.array([0.0, 640.0]), "scores": np.array([0.0, 1.0])}
    b = {"boxes": np.array([0.0, 640.0]), "scores": np.array([0.1, 1.0])}
    assert quantize.sqnr([a], [b]) == pytest.approx(10 * np.log10(0.5 / 0.01)), "the worst part counts, whatever its range"
    assert quantize.sqnr([a], [a]) == float("inf")


def test_no_picture_is_refused(exact: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        quantize.calibrated(exact, [], "min-max")


def test_equalization_is_exact_and_evens_out_the_ranges(exact: onnx.ModelProto) -> None:
    made, pairs = cures.equalized(exact)
    assert pairs == 1, "neither the depthwise layer nor SiLU lets a scale through"
    assert noise(exact, made) > 100
    values = {value.name: numpy_helper.to_array(value) for value in made.graph.initializer}
    first, second = (
        values[next(n for n in made.graph.node if n.name == name).input[1]] for name in quantize.layers(made)[:2]
    )
    np.testing.assert_allclose(np.abs(first).max((1, 2, 3)), np.abs(second).max((0, 2, 3)), rtol=1e-4)


def test_clipping_and_bias_correction_leave_less_error(exact: onnx.ModelProto) -> None:
    names = quantize.layers(exact)
    torch.manual_seed(0)
    weight = torch.randn(6, 40)
    weight[:, 0] = 6
    peak = weight.abs().amax(1, keepdim=True)
    value = numpy_helper.from_array(weight.reshape(6, 40, 1, 1).numpy(), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="only")
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, c, 4, 4]) for n, c in (("x", 40), ("y", 6))]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [value])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    cut = torch.from_numpy(numpy_helper.to_array(cures.clipped(model, ["only"]).graph.initializer[0]).reshape(6, 40).copy())
    limit = cut.abs().amax(1, keepdim=True)
    before = (weight - cures.rounded(weight, peak)).square().sum()
    assert (weight - cures.rounded(cut, limit)).square().sum() <= before
    x = [np.random.default_rng(seed).random((1, 40, 4, 4), dtype=np.float32) for seed in range(3)]
    means = cures.input_means(model, x)
    fixed = cures.bias_corrected(model, ["only"], means)
    lossy = [weight.reshape(6, 40, 1, 1), cures.rounded(weight, peak).reshape(6, 40, 1, 1)]
    bias = torch.from_numpy(numpy_helper.to_array(fixed.graph.initializer[1]).copy())
    batch = torch.from_numpy(np.concatenate(x))
    exact_mean, lossy_mean = (torch.conv2d(batch, w).mean((0, 2, 3)) for w in lossy)
    assert (lossy_mean - exact_mean).abs().max() > 1e-3
    torch.testing.assert_close(lossy_mean + bias, exact_mean, rtol=0, atol=1e-5)
    assert cures.bias_corrected(exact, [], {}).SerializeToString() == exact.SerializeToString(), "of no layer, nothing"
    assert len(cures.input_means(exact, pictures(2))) == 5 and names


def test_the_layer_that_does_harm_is_found(exact: onnx.ModelProto) -> None:
    """Channels of ranges from 0.01 to 100 meet one scale where the second layer quantizes its input."""
    names = quantize.layers(exact)
    ranges = quantize.calibrated(exact, pictures(), "min-max")
    found = dict(quantize.sensitivity(exact, ranges, names, pictures(), whole))
    assert set(found) == set(names)
    rest = quantize.quantized(exact, ranges, [name for name in names if name != min(found, key=found.__getitem__)])
    assert noise(exact, rest) > noise(exact, quantize.quantized(exact, ranges, names))


@given(st.integers(1, 60), st.data())
def test_the_smallest_set_is_found(n: int, data: st.DataObject) -> None:
    """Of a loss that each layer adds its share to, most harmful first."""
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)), reverse=True)
    limit = data.draw(st.floats(0, sum(shares)))
    order = [str(index) for index in range(n)]

    def loss(kept: Sequence[str]) -> float:
        return sum(share for name, share in zip(order, shares) if name not in set(kept))

    kept = int8.smallest(lambda kept: loss(kept) <= limit, order)
    fewest = next(k for k in range(n + 1) if loss(order[:k]) <= limit or k == n)
    assert len(kept) == fewest and (loss(kept) <= limit or len(kept) == n)


def test_layers_that_turn_out_harmless_go_back() -> None:
    assert int8.smallest(lambda kept: "c" in kept, list("abcdef")) == ["c"]


# ---- the tool -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.make_shapes(tmp_path_factory.mktemp("data"), train=6, val=4, size=64)


def test_a_layer_that_gives_next_to_nothing(tmp_path: Path, data: Path) -> None:
    """Its values fill no histogram, so that only min-max is left; that was a crash."""
    model = Head().eval()
    with torch.no_grad():
        model.first.weight.mul_(1e-43)
        model.first.bias.zero_()
    torch.onnx.export(model, (torch.rand(1, 3, 16, 16),), tmp_path / "head.onnx", dynamo=False, opset_version=18)
    exact = quantize.named(onnx.load(str(tmp_path / "head.onnx")))
    with pytest.raises(ValueError, match="bins"):
        quantize.calibrated(exact, pictures(), "percentile 99.999")
    chosen, said = open_data(data).calibration, []
    maker = int8._Maker(exact, quantize.layers(exact), chosen, pictures(2), whole, [])
    _, tried = maker.best_recipe(said.append)
    assert tried[0].name == "min-max" and not any("percentile" in entry.name for entry in tried)
    assert any("percentile 99.999: cannot be taken here" in line for line in said)


def named_model(folder: Path) -> Path:
    weights = saved(folder, loud=True)
    content = torch.load(weights, weights_only=False)
    content["model"].names = dict(enumerate(shapes.NAMES)) | {
        index: f"other {index}" for index in range(3, content["model"].model[-1].nc)
    }
    torch.save(content, weights)
    return weights


def test_int8_and_ap_of_every_form(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = named_model(tmp_path)
    assert main([str(weights), "--format", "onnx", "--int8", "--data", str(data)]) == 0, capsys.readouterr().err
    assert {"best_deploy_int8.onnx", "best_deploy.onnx"} <= files(tmp_path)
    found = report(weights)
    entry = found["artifacts"]["onnx_int8"]
    assert entry["proved"] and entry["int8"]["drop"] <= 1.0 and entry["int8"]["kept_in_float"] == []
    assert sum(tried["chosen"] for tried in entry["int8"]["tried"]) == 1 and len(entry["int8"]["tried"]) >= 4
    noises = [layer["sqnr_db"] for layer in entry["int8"]["sensitivity"]]
    assert noises == sorted(noises), "the worst layers first"
    for form in (found["trained"], *found["artifacts"].values()):
        assert set(form["ap"]) == {"ap", "ap50", "ap75", "small", "medium", "large"} and 0 <= form["ap"]["ap"] <= 1
    assert found["trained"]["ap"] == pytest.approx(found["artifacts"]["pt"]["ap"], abs=1e-3)
    assert found["settings"]["data"] == "data.yaml" and found["settings"]["int8"]


def test_ap_of_other_formats(tmp_path: Path, data: Path) -> None:
    """Each by its own runtime, on the pictures that the others see; a file that takes two at once too."""
    weights = named_model(tmp_path)
    formats = ["onnx", "torchscript", *(name for name in ("openvino", "ncnn") if importlib.util.find_spec(name))]
    assert main([str(weights), "--format", *formats, "--batch", "2", "--data", str(data), "--no-latency"]) == 0
    found = report(weights)
    assert set(found["artifacts"]) == {"pt", *formats}
    proved_on = found["settings"]["pictures"]
    assert len(proved_on) == 2 and {*proved_on} <= {picture.path.name for picture in open_data(data).pictures}
    for name in formats:
        assert found["artifacts"][name]["ap"] == pytest.approx(found["trained"]["ap"], abs=1e-3), name


def test_a_loss_that_stays_too_large_is_not_proved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = named_model(tmp_path)
    monkeypatch.setattr(int8.Int8, "drop", property(lambda self: 3.5))
    assert main([str(weights), "--format", "onnx", "--int8", "--data", str(data)]) == 3
    assert "loses 3.50 AP, over the 1.0 of --int8-max-drop" in capsys.readouterr().err
    assert "best_deploy.unproved_int8.onnx" in files(tmp_path) and "best_deploy_int8.onnx" not in files(tmp_path)


def test_no_memory_for_calibration_keeps_the_rest(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = named_model(tmp_path)
    (tmp_path / "best_deploy_int8.onnx").write_bytes(b"the one before")

    def full(*args: object) -> None:
        raise MemoryError("16 GiB")

    monkeypatch.setattr(quantize, "calibrated", full)
    assert main([str(weights), "--format", "onnx", "--int8", "--data", str(data)]) == 3
    assert "it could not be made (MemoryError: 16 GiB); give a smaller --imgsz" in capsys.readouterr().err
    assert (tmp_path / "best_deploy_int8.onnx").read_bytes() == b"the one before"
    assert json.loads((tmp_path / "best_deploy_report.json").read_text())["artifacts"]["onnx"]["proved"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--int8"], "--int8 needs --data"),
        (["--int8", "--half", "--data", "x.yaml"], "--int8 and --half exclude each other"),
        (["--data", "nowhere.yaml"], "nowhere.yaml does not exist, and nothing is downloaded"),
    ],
)
def test_bad_requests(tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), *options]) == 2
    assert said in capsys.readouterr().err and files(tmp_path) == {"best.pt"}


def test_data_of_another_kind_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--data", str(data)]) == 2
    assert "has the classes circle, square, triangle; the detector has" in capsys.readouterr().err

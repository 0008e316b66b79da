"""ONNX in, ONNX out: what is fused is what the algebra folds, what is refused stays, and nothing wrong passes the proof."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from test_blocks import shuffled
from torch import nn
from yolo_helpers import randomize_norms

from rep_backbones import blocks, fuse
from rep_backbones.export.onnx_fuse import fuse_onnx
from rep_backbones.export.onnx_proof import prove
from rep_backbones.registry import LAYERS
from rep_backbones.yolo.fuse_onnx import main, run

ONLINE = {"OREPABlock"}  # its kernel is folded in forward, which the exporter does not follow: fuse it in Python
C = 8


def exported(model: nn.Module, size: int = 16, c1: int = C, **options: Any) -> ModelProto:
    file = io.BytesIO()
    x = torch.rand(1, c1, size, size)
    torch.onnx.export(model.float().eval(), (x,), file, dynamo=False, opset_version=18, input_names=["x"], **options)
    return onnx.load_from_string(file.getvalue())


def graph(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], outputs: Sequence[str] = ("y",), size: Any = 12, c1: int = 4
) -> ModelProto:
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, c1, size, size])
    made = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4) for name in outputs]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], made, values), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def kernel(c2: int, c1: int, k: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(c2, c1, k, k)).astype(np.float32)


def conv(x: str, w: str, y: str, pad: int = 0, **attributes: Any) -> onnx.NodeProto:
    name, *bias = w.split()
    return helper.make_node("Conv", [x, name, *bias], [y], pads=[pad] * 4, **attributes)


def convs(model: ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in model.graph.node)


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def fused(model: ModelProto) -> ModelProto:
    """The fused model, proved, and the given one unchanged."""
    before = model.SerializeToString()
    made, found = fuse_onnx(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(made)
    assert prove(model, made, [each.output for each in found])
    return made


# ---- what is fused -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Constant folding")
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ONLINE])
def test_every_block_becomes_what_fuse_makes_of_it(name: str) -> None:
    torch.manual_seed(0)
    block = shuffled(LAYERS[name].cls(C, C))
    made = fused(exported(block))
    assert convs(made) == convs(exported(fuse(block)))


def test_strides_groups_and_dilations() -> None:
    torch.manual_seed(0)
    for block in (
        blocks.RepVGGBlock(8, 16, s=2, g=2),
        blocks.MobileOneBlock(8, 8, g=8, s=2),
        blocks.DilatedReparamBlock(8, 8, k=13),
        blocks.ACBlock(8, 12, k=(3, 5), s=(1, 2), d=2),
    ):
        made = fused(exported(shuffled(block)))
        assert convs(made) == 1 and len(made.graph.node) == len(exported(fuse(block)).graph.node)


def test_any_size_of_picture_and_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[shuffled(blocks.RepConv(8, 8)) for _ in range(2)])
    made = fused(exported(model, dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}}))
    assert convs(made) == 2 and made.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "h"
    sides = {"a": kernel(4, 4, 3).astype(np.float16), "b": kernel(4, 4, 1).astype(np.float16)}
    nodes = [conv("h", "a", "p", 1), conv("h", "b", "q"), helper.make_node("Add", ["p", "q"], ["z"])]
    casts = [helper.make_node("Cast", ["x"], ["h"], to=10), *nodes, helper.make_node("Cast", ["z"], ["y"], to=1)]
    made = fused(graph(casts, sides))
    assert operators(made) == ["Cast", "Conv", "Cast"] and made.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16


def test_metadata_names_and_other_nodes_stay() -> None:
    torch.manual_seed(0)
    model = exported(nn.Sequential(shuffled(blocks.RepVGGBlock(C, C)), nn.MaxPool2d(2), nn.Sigmoid()))
    entry = model.metadata_props.add()
    entry.key, entry.value = "names", "{0: 'cat'}"
    made = fused(model)
    assert operators(made) == ["Conv", "Relu", "MaxPool", "Sigmoid"]
    assert made.metadata_props == model.metadata_props and made.opset_import == model.opset_import
    assert made.graph.input == model.graph.input and made.graph.output == model.graph.output
    assert len(made.graph.initializer) == 2, "the branches' kernels are gone"


def test_padding_with_a_bias_that_was_subtracted_is_a_convolution() -> None:
    """As exports of DBB have it: subtract the border, pad with zeros, add it again."""
    border = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) - 1.5
    constants = {
        "a": kernel(4, 4, 1),
        "b": border.reshape(-1),
        "k": kernel(4, 4, 3, 1),
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "c": border,
    }
    nodes = [
        conv("x", "a b", "s"),
        helper.make_node("Sub", ["s", "c"], ["t"]),
        helper.make_node("Pad", ["t", "p"], ["u"]),
        helper.make_node("Add", ["u", "c"], ["v"]),
        conv("v", "k", "y"),
    ]
    assert operators(fused(graph(nodes, constants))) == ["Conv"]


def test_constants_by_arithmetic_pools_scales_and_strided_slices() -> None:
    n = helper.make_node
    constants = {
        "w": kernel(4, 4, 3),
        "two": np.float32(2),
        "scale": kernel(4, 1, 1, 2).reshape(4, 1, 1),
        "from": np.array([0, 0]),
        "to": np.array([2**63 - 1, 2**63 - 1]),
        "axes": np.array([2, 3]),
        "step": np.array([2, 2]),
        "one": np.array([1, 1]),
    }
    nodes = [
        conv("x", "w", "a", 1, strides=[2, 2]),
        n("Mul", ["scale", "a"], ["b"]),
        n("AveragePool", ["x"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1),
        n("Div", ["c", "two"], ["d"]),
        n("Mul", ["step", "one"], ["steps"]),
        n("Slice", ["x", "from", "to", "axes", "steps"], ["e"]),
        n("Sum", ["b", "d", "e"], ["f"]),
        n("Identity", ["f"], ["y"]),
    ]
    assert operators(fused(graph(nodes, constants))) == ["Conv"]


def test_concatenated_convolutions_of_one_kernel_size_only() -> None:
    constants = {"w": kernel(4, 4, 3), "v": kernel(2, 4, 3, 1), "u": kernel(4, 4, 1, 2)}
    alike = [conv("x", "w", "a", 1), conv("x", "v", "b", 1), helper.make_node("Concat", ["a", "b"], ["y"], axis=1)]
    made = fused(graph(alike, {name: constants[name] for name in "wv"}))
    assert operators(made) == ["Conv"] and len(made.graph.initializer) == 1
    unlike = [conv("x", "w", "a", 1), conv("x", "u", "b"), helper.make_node("Concat", ["a", "b"], ["y"], axis=1)]
    made = fused(graph(unlike, {name: constants[name] for name in "wu"}))
    assert operators(made) == ["Conv", "Conv", "Concat"], "as one, the 1x1 would be nine times as much work"


# ---- what is left --------------------------------------------------------------------------------------------------------

N = helper.make_node
SUM = [conv("x", "w", "a", 1), conv("x", "u", "b")]
LEFT: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "an activation in a branch": ([*SUM, N("Relu", ["a"], ["r"]), N("Add", ["r", "b"], ["y"])], {}),
    "a residual": (
        [conv("x", "w", "a", 1), N("Relu", ["a"], ["r"]), conv("r", "w", "b", 1), N("Add", ["x", "b"], ["y"])],
        {},
    ),
    "padding behind a bias": ([conv("x", "u c", "a"), conv("a", "w", "y", 1)], {}),
    "padding behind padding": ([conv("x", "w", "a", 1), conv("a", "w", "y", 1)], {}),
    "a narrow middle": ([conv("x", "down", "a"), conv("a", "up", "y")], {}),
    "a computed kernel": (
        [
            N("GlobalAveragePool", ["x"], ["g"]),
            N("Mul", ["w", "g"], ["v"]),
            conv("x", "v", "a", 1),
            N("Add", ["a", "x"], ["y"]),
        ],
        {},
    ),
    "a pool that does not count its padding": (
        [
            conv("x", "u", "a"),
            N("AveragePool", ["x"], ["p"], kernel_shape=[3, 3], pads=[1] * 4),
            N("Add", ["a", "p"], ["y"]),
        ],
        {},
    ),
    "reflected padding": (
        [N("Pad", ["x", "sides"], ["p"], mode="reflect"), conv("p", "w", "a"), N("Add", ["a", "x"], ["y"])],
        {},
    ),
    "padding with ones": ([N("Pad", ["x", "sides", "fill"], ["p"]), conv("p", "w", "a"), N("Add", ["a", "x"], ["y"])], {}),
    "one-sided padding": ([N("Pad", ["x", "corner"], ["p"]), conv("p", "k2", "a"), N("Add", ["a", "x"], ["y"])], {}),
    "a constant for each pixel": ([conv("x", "u", "a"), N("Add", ["a", "plane"], ["y"])], {}),
    "a product of two tensors": ([*SUM, N("Mul", ["a", "b"], ["y"])], {}),
    "a single convolution": ([conv("x", "w", "y", 1)], {}),
    "branches of two tensors": (
        [N("Sigmoid", ["x"], ["s"]), conv("x", "w", "a", 1), conv("s", "w", "b", 1), N("Add", ["a", "b"], ["y"])],
        {},
    ),
    "rows added": ([conv("x", "u", "a"), N("Add", ["a", "row"], ["y"])], {}),
}
CONSTANTS = {
    "w": kernel(4, 4, 3),
    "u": kernel(4, 4, 1, 1),
    "c": np.ones(4, np.float32),
    "down": kernel(1, 4, 1),
    "up": kernel(4, 1, 1),
    "k2": kernel(4, 4, 2),
    "sides": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "corner": np.array([0, 0, 1, 1, 0, 0, 0, 0]),
    "fill": np.float32(1),
    "plane": kernel(1, 1, 12),
    "row": kernel(1, 1, 12)[0, 0, 0],
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_no_convolution_is_left(what: str) -> None:
    nodes, _ = LEFT[what]
    used = {name for node in nodes for name in node.input}
    model = graph(nodes, {name: value for name, value in CONSTANTS.items() if name in used})
    made, found = fuse_onnx(model)
    assert not found and operators(made) == operators(model)
    assert prove(model, made)


def test_a_tensor_that_is_used_elsewhere_is_still_made() -> None:
    nodes = [*SUM, N("Add", ["a", "b"], ["y"]), N("Relu", ["a"], ["z"])]
    used = {"w": CONSTANTS["w"], "u": CONSTANTS["u"]}
    made = fused(graph(nodes, used, ("y", "z")))
    assert operators(made) == operators(graph(nodes, used, ("y", "z"))), "nothing is saved where both convolutions stay"
    made = fused(graph([*nodes[:2], N("Add", ["a", "b"], ["y"])], used, ("y", "b")))
    assert sorted(operators(made)) == ["Conv", "Conv"], "the 3x3 is merged, the 1x1 is an output"


def test_weights_that_a_caller_may_replace_are_no_constants() -> None:
    model = graph([*SUM, N("Add", ["a", "b"], ["y"])], {"w": CONSTANTS["w"], "u": CONSTANTS["u"]})
    model.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 4, 3, 3]))
    assert not fuse_onnx(model)[1]


def test_a_tensor_that_a_subgraph_takes_is_still_made() -> None:
    inner = helper.make_graph(
        [N("Identity", ["a"], ["then"])],
        "t",
        [],
        [helper.make_tensor_value_info("then", onnx.TensorProto.FLOAT, [None] * 4)],
    )
    other = helper.make_graph(
        [N("Identity", ["x"], ["else"])],
        "e",
        [],
        [helper.make_tensor_value_info("else", onnx.TensorProto.FLOAT, [None] * 4)],
    )
    nodes = [
        *SUM,
        N("Add", ["a", "b"], ["y"]),
        N("ReduceMax", ["x"], ["m"], keepdims=0),
        N("Cast", ["m"], ["on"], to=9),
        N("If", ["on"], ["z"], then_branch=inner, else_branch=other),
    ]
    model = graph(nodes, {"w": CONSTANTS["w"], "u": CONSTANTS["u"]}, ("y", "z"))
    assert operators(fused(model)) == operators(model)


# ---- whatever graph comes -----------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> ModelProto:
    """Random graphs of 4 channels and 12x12 pixels: convolutions, norms, constants, sums, activations, pools."""
    nodes, constants, tensors = [], {}, ["x"]
    for index in range(draw(st.integers(2, 9))):
        seed, y = draw(st.integers(0, 99)), f"t{index}"
        x = tensors[-1 - min(draw(st.integers(0, 3)), len(tensors) - 1)]
        kind = draw(
            st.sampled_from(["conv", "conv", "norm", "shift", "scale", "sum", "sum", "relu", "pool", "minus", "same"])
        )
        random = np.random.default_rng(seed)
        if kind == "conv":
            k, g = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2, 4]))
            constants[f"w{index}"] = kernel(4, 4 // g, k, seed) / (2 * k)
            bias = draw(st.booleans())
            if bias:
                constants[f"b{index}"] = random.normal(size=4).astype(np.float32)
            nodes.append(conv(x, f"w{index} b{index}" if bias else f"w{index}", y, k // 2, group=g))
        elif kind == "norm":
            names = [f"n{index}{part}" for part in "wbmv"]
            values = [*random.normal(size=(3, 4)), random.uniform(0.3, 2, size=4)]
            constants |= {name: value.astype(np.float32) for name, value in zip(names, values)}
            nodes.append(N("BatchNormalization", [x, *names], [y]))
        elif kind in ("shift", "scale"):
            constants[f"c{index}"] = random.normal(size=(1, 4, 1, 1)).astype(np.float32)
            nodes.append(N({"shift": "Add", "scale": "Mul"}[kind], [x, f"c{index}"], [y]))
        elif kind in ("sum", "minus"):
            other = tensors[-1 - min(draw(st.integers(0, 3)), len(tensors) - 1)]
            nodes.append(N("Add" if kind == "sum" else "Sub", [x, other], [y]))
        elif kind == "pool":
            count = draw(st.integers(0, 1))
            nodes.append(N("AveragePool", [x], [y], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=count))
        else:
            nodes.append(N({"relu": "Relu", "same": "Identity"}[kind], [x], [y]))
        tensors.append(y)
    outputs = dict.fromkeys([tensors[-1], *draw(st.lists(st.sampled_from(tensors[1:]), max_size=2))])
    return graph(nodes, constants, list(outputs))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_a_random_graph_computes_the_same_afterwards(model: ModelProto) -> None:
    made = fused(model)
    assert convs(made) <= convs(model) and len(made.graph.node) <= len(model.graph.node)
    again, found = fuse_onnx(made)
    assert not found and len(again.graph.node) == len(made.graph.node)


# ---- the tool ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(blocks.RepVGGBlock(3, 8, s=2), blocks.MobileOneBlock(8, 8, g=8), nn.Conv2d(8, 4, 1))
    path = tmp_path / "model.onnx"
    onnx.save(exported(randomize_norms(model), 32, 3), path)
    return path


def test_the_tool(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert main([str(file), "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "2 multi-branch layers fused: 8 -> 3 convolutions" in said and file.read_bytes() == before
    report = json.loads((tmp_path / "new" / "model_fused_report.json").read_text())
    assert report["counts"] == {
        "before": {"nodes": report["counts"]["before"]["nodes"], "convs": 8},
        "after": {"nodes": 5, "convs": 3},
    }
    assert [(each["convs"], each["kernel"], each["groups"]) for each in report["layers"]] == [(2, [3, 3], 1), (5, [3, 3], 8)]
    assert all(0 <= each["error"] <= 1e-6 for each in report["layers"]) and report["artifact"]["proved"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model_fused.onnx", "model_fused_report.json"}
    assert main([str(tmp_path / "new" / "model_fused.onnx")]) == 0
    assert "no affine branches" in capsys.readouterr().out


def test_a_wrong_kernel_does_not_pass(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: ModelProto) -> Any:
        made, found = fuse_onnx(model)
        stored = next(value for value in made.graph.initializer if value.name.endswith(".weight") and len(value.dims) == 4)
        array = numpy_helper.to_array(stored).copy()
        array[0, 0, 0, 0] += 1e-3
        stored.CopyFrom(numpy_helper.from_array(array, stored.name))
        return made, found

    monkeypatch.setattr("rep_backbones.yolo.fuse_onnx.fuse_onnx", wrong)
    good = tmp_path / "model_fused.onnx"
    good.write_bytes(b"of before")
    assert main([str(file)]) == 3
    assert "NOT PROVED" in capsys.readouterr().out and (tmp_path / "model_fused.unproved.onnx").exists()
    assert good.read_bytes() == b"of before"


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, [], "does not exist"),
        (b"", [], "not an ONNX model"),
        (b"\x08\x09 cut off", [], "not an ONNX model"),
        ("whole", ["--size", "0", "4"], "--size 0 4 is not accepted"),
        ("whole", ["--out", "/proc/nowhere"], "/proc/nowhere"),
        ("nan", [], "NaN or inf"),
    ],
    ids=["missing", "empty", "garbage", "size", "target", "nan"],
)
def test_bad_input(file: Path, content: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "nan":
        model = onnx.load(file)
        array = numpy_helper.to_array(model.graph.initializer[0]).copy()
        array.reshape(-1)[0] = np.nan
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
        onnx.save(model, file)
    before = {path.name for path in file.parent.iterdir()}
    assert main([str(file), *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert {path.name for path in file.parent.iterdir()} == before


def test_a_size_that_the_graph_does_not_take_says_how_to_give_one(tmp_path: Path) -> None:
    shape = {"x": {2: "h", 3: "w"}}
    model = exported(
        nn.Sequential(shuffled(blocks.RepConv(3, 4)), nn.Flatten(), nn.Linear(4 * 10 * 10, 2)), 10, 3, dynamic_axes=shape
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="--size 640 640"):
        run(tmp_path / "m.onnx")
    assert run(tmp_path / "m.onnx", size=(10, 10)).status == 0

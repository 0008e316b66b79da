"""YAML rows of ours mean what the stock `Conv` row of the same numbers means: channels, repeats, inputs, head, table,
messages.
"""

import logging
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.utils import LOGGER

from rep_backbones.registry import LAYERS, Layer, layer_named
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import reading

NAMES = sorted(LAYERS)


def parse(*trunk, ch=3, verbose=False, **keys):
    """Layers and the save list of a YAML with these rows."""
    return tasks.parse_model({"nc": 3, "backbone": deepcopy(list(trunk)), "head": [], **keys}, ch=ch, verbose=verbose)


def detector(*trunk, **keys):
    head = [[[len(trunk) - 1], 1, "Detect", ["nc"]]]
    config = {"nc": 3, "backbone": deepcopy(list(trunk)), "head": head, **keys}
    return tasks.DetectionModel(config, ch=3, nc=3, verbose=False)


class Widths(nn.Module):
    """A layer of a user's own with several inputs, which it brings to c2 channels and sums."""

    def __init__(self, c1, c2):
        super().__init__()
        self.given = tuple(c1)
        self.convs = nn.ModuleList(nn.Conv2d(c, c2, 1) for c in c1)

    def forward(self, xs):
        return sum(conv(x) for conv, x in zip(self.convs, xs))


class WithStockConv(nn.Module):
    """A layer of a user's own that holds a stock layer, whose activation the YAML may choose."""

    def __init__(self, c1, c2):
        super().__init__()
        self.conv = Conv(c1, c2)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture
def known(monkeypatch):
    """Makes layers known for one test."""

    def add(cls, repeats="stage"):
        monkeypatch.setitem(LAYERS, cls.__name__, Layer(cls, cls.__name__, repeats))

    return add


# ---- every layer of the registry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("repeats", [1, 4])
def test_each_layer_stands_where_a_conv_would(name, repeats):
    scales = {"scales": {"n": [0.5, 0.25, 1024]}, "scale": "n"}
    layers, save = parse(
        [-1, 1, "Conv", [64]], [-1, repeats, name, [96]], [0, 1, name, [128]], [[-1, 1], 1, "Concat", [1]], **scales
    )
    # upstream's repeated Conv keeps its first width and cannot run: one Conv has the shape that a stage must have
    stock, stock_save = parse(
        [-1, 1, "Conv", [64]], [-1, 1, "Conv", [96]], [0, 1, "Conv", [128]], [[-1, 1], 1, "Concat", [1]], **scales
    )
    assert save == stock_save
    for mine, theirs in zip(layers, stock):
        assert (mine.i, mine.f) == (theirs.i, theirs.f)
    x = layers[0](torch.rand(1, 3, 16, 16))
    for index in (1, 2):
        assert layers[index](x).shape == stock[index](x).shape
        assert layers[index].type.endswith(f".{name}") and layers[index].type.startswith("rep_backbones.")
        assert layers[index].np == sum(p.numel() for p in layers[index].parameters())


STRIDED = [name for name in NAMES if LAYERS[name].repeats == "stage" and "s" in [p.name for p in LAYERS[name].parameters]]


@pytest.mark.parametrize("name", STRIDED)
def test_one_row_is_a_stage(name):
    layers, _ = parse([-1, 3, name, [24, 3, 2]], ch=8)
    assert [type(block) for block in layers[0]] == [layer_named(name).cls] * 3
    x, sizes = torch.rand(1, 8, 16, 16), []
    for block in layers[0]:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(24, 8, 8)] * 3, "the first block takes the stride and the channels, the others keep them"


def test_a_layer_with_repeats_inside_gets_them_scaled():
    layers, _ = parse([-1, 12, "BepC3", [64, 0.5]], scales={"n": [0.33, 0.5, 1024]}, scale="n", ch=16)
    alone = layer_named("BepC3").cls(16, 32, 4, 0.5)
    assert {k: v.shape for k, v in layers[0].state_dict().items()} == {k: v.shape for k, v in alone.state_dict().items()}


@settings(max_examples=25, deadline=None)
@given(
    c2=st.integers(1, 300),
    n=st.integers(1, 7),
    width=st.sampled_from([0.2, 0.25, 0.33, 0.5, 1.0, 1.25]),
    depth=st.sampled_from([0.33, 0.5, 0.67, 1.0, 1.33]),
    most=st.sampled_from([64, 128, 1024]),
)
def test_width_and_depth_are_those_of_a_conv(c2, n, width, depth, most):
    scales = {"scales": {"s": [depth, width, most]}, "scale": "s", "nc": 1000}
    with torch.device("meta"):
        mine, _ = parse([-1, n, "RepConv", [c2, 3]], [-1, 1, "Conv", [8]], **scales)
        stock, _ = parse([-1, n, "Conv", [c2, 3]], [-1, 1, "Conv", [8]], **scales)
    assert mine[1].conv.in_channels == stock[1].conv.in_channels
    blocks = len(stock[0]) if type(stock[0]) is nn.Sequential else 1
    assert len(multi_branch(mine)) == blocks


def test_channels_that_equal_the_class_count_are_scaled_too():
    layers, _ = parse([-1, 1, "RepConv", [64]], [-1, 1, "Conv", [32]], nc=64, scales={"n": [1, 0.25, 1024]}, scale="n")
    assert layers[1].conv.in_channels == 16


# ---- arguments ------------------------------------------------------------------------------------------------------------


def test_keywords_come_in_a_mapping_at_the_end():
    layers, _ = parse([-1, 1, "RepVGGBlock", [16, 3, 2, {"se": True, "act": "SiLU"}]])
    alone = layer_named("RepVGGBlock").cls(3, 16, 3, 2, se=True, act="SiLU")
    assert repr(layers[0]) == repr(alone)


@pytest.mark.parametrize("args", [["16", "3", "2"], [16, 3, 2, None, "1"], [16, {"k": "3", "s": 2}], [{"c2": 16, "s": 2}]])
def test_strings_that_are_literals_are_literals(args):
    layers, _ = parse([-1, 1, "RepConv", args])
    assert layers[0](torch.rand(1, 3, 8, 8)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("Hardswish", nn.Hardswish),
        ("nn.GELU", nn.GELU),
        ("torch.nn.SiLU()", nn.SiLU),
        ("nn.LeakyReLU(0.3)", nn.LeakyReLU),
        (False, None),
    ],
)
def test_activations_go_by_the_name_of_their_class(spec, expected):
    layers, _ = parse([-1, 2, "RepConv", [8, {"act": spec}]])
    found = [module for module in layers.modules() if type(module).__module__ == "torch.nn.modules.activation"]
    assert [type(module) for module in found] == ([expected] * 2 if expected else [])
    assert len(set(map(id, found))) == len(found), "each block has its own"
    if expected is nn.LeakyReLU:
        assert found[0].negative_slope == 0.3


def test_the_yaml_activation_reaches_stock_layers_only_and_no_later_model(known):
    known(WithStockConv)
    before = Conv.default_act
    layers, _ = parse([-1, 1, "Conv", [8]], [-1, 1, "RepConv", [8]], [-1, 1, "WithStockConv", [8]], activation="nn.ReLU6()")
    assert isinstance(layers[0].act, nn.ReLU6) and isinstance(layers[2].conv.act, nn.ReLU6)
    assert not any(isinstance(module, nn.ReLU6) for module in layers[1].modules())
    assert Conv.default_act is before
    with pytest.raises(ValueError, match="row 1"):
        parse([-1, 1, "Conv", [8]], [-1, 1, "RepConv", [8, -3]], activation="nn.ReLU6()")
    assert Conv.default_act is before


def test_a_layer_with_several_inputs_gets_all_their_widths(known):
    known(Widths)
    trunk = [
        [-1, 1, "Conv", [16]],
        [-1, 1, "RepConv", [24]],
        [-1, 2, "RepConv", [32]],
        [[0, -1, -2], 1, "Widths", [40]],
        [-1, 1, "Conv", [8]],
    ]
    layers, save = parse(*trunk, scales={"n": [1.0, 0.5, 1024]}, scale="n")
    assert layers[3].given == (8, 16, 16) and layers[4].conv.in_channels == 24
    assert save == [0, 1] and layers[3].f == [0, -1, -2]
    model = detector(*trunk)
    assert model(torch.rand(1, 3, 64, 64)) is not None


# ---- the head ------------------------------------------------------------------------------------------------------------


def head_size(*trunk, **keys):
    return sum(p.numel() for p in detector(*trunk, **keys).model[-1].parameters())


def test_a_trunk_of_our_layers_has_the_lighter_head():
    light = head_size([-1, 1, "C3k2", [32, False]], scale="n")  # up to 8.4.100 this row fails where the YAML has no scale
    heavy = head_size([-1, 1, "C2f", [32]])
    assert light < heavy, "the two heads of upstream"
    assert head_size([-1, 1, "RepConv", [32]]) == light
    assert head_size([-1, 1, "Conv", [16]], [-1, 2, "RepVGGBlock", [32]], [-1, 1, "SPPF", [32, 5]]) == light
    # a YOLOv8 with one layer replaced keeps the head that YOLOv8's weights fit
    assert head_size([-1, 1, "RepConv", [32]], [-1, 1, "C2f", [32]]) == heavy
    assert head_size([-1, 1, "RepConv", [32]], [-1, 1, "C2f", [32]], legacy=False) == light
    assert head_size([-1, 1, "RepConv", [32]], legacy=True) == heavy
    with pytest.raises(ValueError, match="legacy: true.*C3k2"):
        head_size([-1, 1, "RepConv", [32]], [-1, 1, "C3k2", [32, False]], legacy=True, scale="n")
    with pytest.raises(ValueError, match="legacy.*'heavy'"):
        head_size([-1, 1, "RepConv", [32]], legacy="heavy")


# ---- bad rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1, 1, "RepConv"], r"four entries"),
        ("RepConv", r"four entries"),
        ([-1, 1, "RepCnov", [8]], r"unknown layer 'RepCnov'.*RepConv.*register_layer"),
        ([-1, 1, "nn.RepConv", [8]], r"unknown layer 'nn.RepConv'"),
        ([-1, 0, "RepConv", [8]], r"repeats.*at least 1, got 0"),
        ([-1, 1.5, "RepConv", [8]], r"repeats.*got 1.5"),
        ([7, 1, "RepConv", [8]], r"`from` must point to rows before this one, 0 to 0"),
        (["x", 1, "RepConv", [8]], r"`from` must be the number"),
        ([[], 1, "RepConv", [8]], r"`from` must be the number"),
        ([-1, 1, "RepConv", []], r"arguments must be a list, \[c2, k=3"),
        ([-1, 1, "RepConv", 8], r"arguments must be a list"),
        ([-1, 1, "RepConv", [0]], r"c2, is the number of output channels.*got 0"),
        ([-1, 1, "RepConv", ["wide"]], r"c2, is the number of output channels.*got 'wide'"),
        ([-1, 1, "RepConv", [True]], r"got True"),
        ([-1, 1, "RepConv", [8, 3, 1, None, 1, 1, True, 5, 6]], r"RepConv takes \[c2, k=3.*too many"),
        ([-1, 1, "RepConv", [8, {"kernel": 3}]], r"RepConv takes \[c2, k=3.*kernel"),
        ([-1, 1, "RepConv", [8, {"k": 3}, 3]], r"mapping.*at the end"),
        ([-1, 1, "RepConv", [8, 3, 0]], r"RepConv: s must be at least 1, got 0"),
        ([-1, 1, "RepConv", [8, "three"]], r"RepConv.*'three'"),
        ([-1, 1, "RepConv", [8, 3, 1, None, 5]], r"RepConv cannot be made with c1=8, c2=8"),
        ([-1, 1, "RepConv", [8, 4]], r"RepConv cannot be made with c1=8, c2=8"),
        ([-1, 1, "RepConv", [8, {"act": "Relu"}]], r"RepConv cannot be made.*Relu"),
        ([-1, 1, "RepConv", [8, {"act": "nn.ReLU(exit())"}]], r"act must be a class of torch.nn"),
        ([-1, 1, "RepConv", [8, {"act": "nn.functional"}]], r"act must be|Relu|functional"),
        ([[-1, 0], 1, "RepConv", [8]], r"RepConv takes one input, got 2; put a Concat row in front: \[\[-1, 0\], 1, Concat"),
        ([-1, 6, "BepC3", [8, 0.0]], r"BepC3 cannot be made.*e=0.0 of 8 channels leaves none inside"),
        ([-1, 1, "CSPStage", [8, {"e": 0.1}]], r"e=0.1 of 8 channels leaves none.*at least 0.125"),
        ([-1, 1, "SimSPPF", [8, 4]], r"SimSPPF cannot be made.*k=4: pooling keeps the size for odd kernels only"),
        ([-1, 1, "RepVGGBlock", [8, {"se": "yes"}]], r"RepVGGBlock: se must be of type bool, got 'yes'"),
    ],
)
def test_a_bad_row_is_named_with_what_is_accepted(row, said):
    with pytest.raises(ValueError, match=rf"(?s)row 1 \(backbone\[1\]\).*{said}"):
        parse([-1, 1, "Conv", [8]], row)


def test_a_yaml_without_rows_is_refused():
    with pytest.raises(ValueError, match="`backbone:` must be a list of rows"):
        tasks.parse_model({"nc": 1, "backbone": None, "head": []}, ch=3, verbose=False)


def test_a_parser_error_of_a_stock_row_is_upstreams_own():
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever upstream raises
        parse([-1, 1, "Conv", [8]], [[0, 0], 1, "Conv", [8]])
    with pytest.raises(type(theirs.value)):
        parse([-1, 1, "RepConv", [8]], [[0, 0], 1, "Conv", [8]])


def test_a_stock_row_with_wrong_arguments_is_named():
    with pytest.raises(TypeError, match=r"row 2 \(backbone\[2\]\).*Conv: .*positional arguments"):
        parse([-1, 1, "RepConv", [8]], [-1, 1, "Conv", [8]], [-1, 1, "Conv", [8, 3, 1, None, 1, 1, True, 5, 6]])


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-3, 9),
            st.floats(),
            st.sampled_from(["RepConv", "BepC3", "k", "nc", "nn.ReLU(", "'", ""]),
        ),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["k", "s", "act", "c2", "x"]), inner, max_size=2)
        ),
        max_leaves=8,
    )
)
def test_no_row_brings_reading_down(row):
    for given_row in (
        row,
        [-1, 1, "RepConv", row],
        [-1, 2, "BepC3", [8, row]],
        [row, 1, "RepConv", [8]],
        [-1, row, "RepConv", [8]],
    ):
        try:
            reading.read_rows({"nc": 3, "backbone": [[-1, 1, "Conv", [8]], given_row], "head": []})
        except ValueError as error:
            assert "row 1 (backbone[1])" in str(error)


# ---- what the user sees, what is stored ----------------------------------------------------------------------------------


def printed(*trunk, **keys):
    class Lines(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines = []

        def emit(self, record):
            self.lines.append(record.getMessage())

    handler, level = Lines(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        parse(*trunk, verbose=True, **keys)
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
    return handler.lines


def test_the_table_shows_true_names(known):
    known(Widths)
    scales = {"scales": {"n": [0.5, 0.5, 1024]}, "scale": "n"}
    lines = printed(
        [-1, 1, "Conv", [16]],
        [-1, 4, "RepVGGBlock", [32, 3, 2]],
        [-1, 6, "BepC3", [32]],
        [[0, 0], 1, "Widths", [8]],
        **scales,
    )
    table = [line.split() for line in lines if line.strip()]
    assert table[0][:3] == ["from", "n", "params"]
    assert [line[0] for line in table[1:]] == ["0", "1", "2", "3"], "no stand-in and no probe is shown"
    assert [line[2] for line in table[1:4]] == ["1", "2", "3"]
    shown = [next(word for word in line if "." in word).rpartition(".")[2] for line in table[1:]]
    assert shown == ["Conv", "RepVGGBlock", "BepC3", "Widths"]
    stock = printed([-1, 1, "Conv", [16]], **scales)
    assert stock[-1] in lines, "a stock row is printed as upstream does"


def test_the_stored_yaml_keeps_the_rows_as_written(tmp_path):
    trunk = [[-1, 1, "Conv", [16, 3, 2]], [-1, 2, "RepConv", [32, 3, 2, {"act": "nn.ReLU()"}]]]
    model = detector(*trunk)
    assert model.yaml["backbone"] == trunk
    torch.save({"model": model}, tmp_path / "last.pt")
    again = torch.load(tmp_path / "last.pt", weights_only=False)["model"]
    rebuilt = tasks.DetectionModel(deepcopy(again.yaml), ch=3, verbose=False)
    rebuilt.load_state_dict(again.state_dict(), strict=True)
    assert [layer.type for layer in rebuilt.model] == [layer.type for layer in model.model]


def test_a_stock_yaml_goes_through_untouched():
    trunk = [[-1, 1, "Conv", [16]], [-1, 2, "C3k2", [32, False]]]
    stock = tasks.parse_model.__wrapped__
    torch.manual_seed(0)
    expected, save = stock({"nc": 3, "scale": "n", "backbone": deepcopy(trunk), "head": []}, ch=3, verbose=False)
    torch.manual_seed(0)
    layers, our_save = parse(*trunk, scale="n")
    assert our_save == save and all(
        torch.equal(a, b) for a, b in zip(layers.state_dict().values(), expected.state_dict().values())
    )

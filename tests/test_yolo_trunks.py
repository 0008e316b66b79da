"""A whole trunk as one row, `[-1, 1, RepVGG, [a0]]`, and Index rows that take its outputs: parsed, checked, saved, fused."""

import json
import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from test_yolo_fusing import ALONE, assert_same, detector, outputs
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from yolo_helpers import MULTI_BRANCH, model_yaml, noise, randomize_norms, tiny_data, train_args  # noqa: F401

import rep_backbones
from rep_backbones import create_backbone, register_layer
from rep_backbones.backbones import Stages
from rep_backbones.registry import TRUNKS
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import checkpoint, install, user_code
from rep_backbones.yolo.fuse_export_cli import main
from rep_backbones.yolo.safe_yaml import validated
from rep_backbones.yolo.stock import to_stock
from rep_backbones.yolo.trainer import RepTrainer

SMALL = {"width": 0.125, "depth": 0.25}
VARIANTS = {"RepVGG": "a0", "EfficientRep": "n", "MobileOne": "s0"}


def rows(name="RepVGG", variant=None):
    """A trunk of which strides 8 and 16 are taken."""
    trunk = [-1, 1, name, [variant or VARIANTS[name], SMALL]]
    return [trunk, [0, 1, "Index", [None, 3]], [0, 1, "Index", [None, 4]]]


HEAD = [[-1, 1, "RepConv", [16]], [[1, 3], 1, "Detect", ["nc"]]]


def model_of(name="RepVGG", variant=None):
    return detector(rows(name, variant), HEAD)


def parse(*trunk, ch=3, **keys):
    return tasks.parse_model({"nc": 3, "backbone": deepcopy(list(trunk)), "head": [], **keys}, ch=ch, verbose=False)


# ---- parsing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_a_row_is_the_backbone_of_that_name(name):
    layers, save = parse(*rows(name), scales={"n": [0.33, 0.25, 64]}, scale="n")
    backbone = create_backbone(f"{name.lower()}_{VARIANTS[name]}", features_only=True, **SMALL).eval()
    backbone.load_state_dict(layers[0].state_dict())
    assert save == [0] and layers[0].f == -1 and layers[0].type.endswith(f".{name}")
    assert layers[0].np == sum(p.numel() for p in backbone.parameters())
    with torch.no_grad():
        picture, *outputs = layers.eval()[0](noise(1))
        expected = backbone(noise(1))
    assert torch.equal(picture, noise(1)) and layers[0].channels == [3, *backbone.channels]
    assert layers[0].strides == [1, 2, 4, 8, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("row", "channels"),
    [
        ([0, 1, "Index", [None, 3]], 24),
        ([0, 1, "Index", [24, 3]], 24),
        ([-1, 1, "Index", ["None", "-1"]], 320),
        ([0, 1, "Index", [3]], 3),  # as upstream has it, output 0 where none is named
    ],
)
def test_index_rows_get_the_channels_of_their_output(row, channels):
    layers, _ = parse([-1, 1, "RepVGG", ["a0", 0.25]], row, [-1, 1, "Conv", [8]])
    assert layers[2].conv.in_channels == channels
    assert layers.eval()[1](layers[0](noise(1))).shape[1] == channels


def test_the_variant_may_be_the_scale():
    scales = {"a0": [1.0, 0.5, 64], "a1": [1.0, 0.5, 64]}
    for scale, taken in (("a1", 32), ("a0", 24), ("", 24)):
        layers, _ = parse([-1, 1, "RepVGG", ["scale", 0.25]], [0, 1, "Index", [None, 3]], scales=scales, scale=scale)
        assert layers[0].channels[3] == taken


def test_a_trunk_may_stand_behind_other_rows():
    layers, _ = parse([-1, 1, "Conv", [16, 3, 2]], [-1, 1, "MobileOne", ["s1", 0.25]], [1, 1, "Index", [None, 2]])
    assert layers[1].channels[0] == 16 and layers[1].stem[0].affine_part.kxk_0.conv.in_channels == 16
    first = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "MobileOne", ["s1", 0.25]]]
    with pytest.raises(ValueError, match="row 2.*channels of output 0 of row 1, MobileOne, depend on its input; give their"):
        parse(*first, [1, 1, "Index", [None, 0]])
    layers, _ = parse(*first, [1, 1, "Index", [16, 0]], [-1, 1, "Conv", [8]])
    assert layers[3].conv.in_channels == 16


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0, 1, "Index", [7, 3]], r"output 3 of row 0, RepVGG, has 16 channels, got 7; write \[16, 3\] or \[None, 3\]"),
        ([0, 1, "Index", ["x", 3]], r"has 16 channels, got 'x'"),
        ([0, 1, "Index", [16.0, 3]], r"has 16 channels, got 16.0"),
        (
            [0, 1, "Index", [None, 6]],
            r"outputs of row 0, RepVGG, are 0 \(3 channels\), .*, 5 \(160 channels\), got \[None, 6\]",
        ),
        ([-1, 1, "Index", [None, "three"]], r"Index takes \[channels, output\]"),
        ([0, 1, "Index", [None, 3, 4]], r"Index takes \[channels, output\]"),
        ([0, 2, "Index", [None, 3]], r"row 0, RepVGG, gives a list; put a row in between: \[0, 1, Index, \[160, 5\]\]"),
        ([0, 1, "Conv", [8]], r"row 0, RepVGG, gives a list; put a row in between: \[0, 1, Index, \[160, 5\]\]"),
        ([-1, 1, "RepConv", [8]], r"gives a list"),
        ([[0, -1], 1, "Concat", [1]], r"gives a list"),
    ],
)
def test_a_row_that_takes_a_trunk_wrongly_is_named_with_what_is_right(row, said):
    with pytest.raises(ValueError, match=rf"row 1 \(backbone\[1\]\).*{said}"):
        parse(rows()[0], row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1, 1, "RepVGG", []], r"arguments must be a list, \[variant, width=1.0, depth=1.0\], got \[\]"),
        ([-1, 1, "RepVGG", ["b1g"]], r"no variant 'b1g': did you mean b1g4.*Accepted are a0, a1, "),
        ([-1, 1, "RepVGG", [64]], r"variant must be of type str, got 64"),
        ([-1, 1, "RepVGG", ["a0", 0]], r"width=0 is not accepted"),
        ([-1, 1, "RepVGG", ["a0", {"se": True}]], r"RepVGG takes \[variant, width=1.0, depth=1.0\], got 'a0', se: True"),
        ([-1, 2, "RepVGG", ["a0"]], r"RepVGG is a whole trunk; its `repeats` must be 1, got 2"),
        ([[-1, 0], 1, "RepVGG", ["a0"]], r"RepVGG takes one input, got 2"),
    ],
)
def test_a_bad_trunk_is_named_with_what_is_accepted(row, said):
    with pytest.raises(ValueError, match=rf"row 1 \(backbone\[1\]\).*{said}"):
        parse([-1, 1, "Conv", [8]], row)


class TwoStages(nn.Module):
    """A trunk of a user's own, which computes with numbers while it is built."""

    def __init__(self, c1, width):
        super().__init__()
        self.rates = torch.linspace(0, 0.1, 2).tolist()
        self.first, self.second = nn.Conv2d(c1, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.channels = [width, 2 * width]

    def forward(self, x):
        return [y := self.first(x), self.second(y)]


class WithoutChannels(nn.Module):
    def __init__(self, c1):
        super().__init__()


def test_trunks_of_the_user(tmp_path):
    for cls in (TwoStages, WithoutChannels):
        register_layer(cls, outputs="list")
    try:
        with pytest.raises(ValueError, match="output 0 of row 0, TwoStages, has 8 channels, got 9"):
            parse([-1, 1, "TwoStages", [8]], [0, 1, "Index", [9, 0]])
        with pytest.raises(ValueError, match="row 0.*WithoutChannels cannot be made: .*no attribute 'channels'"):
            parse([-1, 1, "WithoutChannels", [{}]], [0, 1, "Index", [9, 0]])
        trunk = [
            [-1, 1, "Conv", [8, 3, 2]],
            [-1, 1, "TwoStages", [8]],
            [1, 1, "Index", [None, 0]],
            [1, 1, "Index", [None, 1]],
        ]
        model = detector(trunk, [[[2, 3], 1, "Detect", ["nc"]]]).eval()
        assert model.stride.tolist() == [4, 8]
        torch.save({"model": model, "train_args": {"task": "detect"}}, tmp_path / "best.pt")
        assert torch.equal(outputs(checkpoint.load(tmp_path / "best.pt").model), outputs(model))
        assert f"import {__name__}\n" in install._worker_imports()
        assert user_code.load([__name__]) == [], "it registers a trunk"
    finally:
        TRUNKS.pop("TwoStages", None)
        TRUNKS.pop("WithoutChannels", None)
    with pytest.raises(TypeError, match="outputs='list' the first arguments must be c1; they are layout"):
        register_layer(Stages, outputs="list")
    with pytest.raises(ValueError, match="accepted are 'one' and 'list'"):
        register_layer(TwoStages, outputs="two")
    with pytest.raises(ValueError, match="belongs to rep_backbones.backbones.repvgg"):
        register_layer(TwoStages, outputs="list", name="RepVGG")


# ---- saved and fused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_saved_and_loaded_as_trained_and_as_deployed(name, tmp_path):
    model = model_of(name).eval()
    assert validated(model.yaml) == model.yaml
    torch.save({"model": model, "train_args": {"task": "detect"}}, tmp_path / "best.pt")
    loaded = checkpoint.load(tmp_path / "best.pt").model
    assert type(loaded.model[0]) is type(model.model[0]) and torch.equal(outputs(loaded), outputs(model))
    if hasattr(tasks, "_SafeLoad"):
        restricted = tasks.torch_safe_load(tmp_path / "best.pt", safe_only=True)[0]["model"]
        assert torch.equal(outputs(restricted), outputs(model))
    deploy = to_stock(rep_backbones.fuse(model))
    assert type(deploy.model[0]).__name__ == "TorchVision" and torch.equal(
        outputs(rep_backbones.fuse(model)), outputs(deploy)
    )
    torch.save({"model": deploy, "train_args": {"task": "detect"}}, tmp_path / "best_deploy.pt")
    assert torch.equal(outputs(checkpoint.load(tmp_path / "best_deploy.pt").model), outputs(deploy))


@pytest.mark.parametrize(("name", "variant"), [*VARIANTS.items(), ("RepVGG", "d2se"), ("EfficientRep", "m")])
def test_fused_in_an_ultralytics_model(name, variant):
    model = model_of(name, variant)
    expected = outputs(model)
    assert not model.is_fused()
    assert model.fuse(verbose=False).is_fused() and not multi_branch(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert_same(expected, outputs(model))
    trunk = model.model[0]
    assert (trunk.i, trunk.f) == (0, -1) and trunk.np == sum(p.numel() for p in trunk.parameters())


def test_a_deploy_checkpoint_needs_stock_ultralytics_only(tmp_path):
    """REP_TEST_ULTRALYTICS as in test_yolo_fusing.py."""
    model = model_of("RepVGG", "d2se").eval()
    file = tmp_path / "deploy.pt"
    torch.save({"model": to_stock(rep_backbones.fuse(model)), "train_args": {"task": "detect"}}, file)
    assert b"rep_backbones" not in file.read_bytes()
    (tmp_path / "alone.py").write_text(ALONE)
    for release in ["", *filter(None, os.environ.get("REP_TEST_ULTRALYTICS", "").split(os.pathsep))]:
        env = {**os.environ, **({"PYTHONPATH": release} if release else {}), "ULTRALYTICS_SAFE_LOAD": "1"}
        command = [sys.executable, str(tmp_path / "alone.py"), str(file), str(tmp_path / "out.npy")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]).get("restricted", 0) == 0
        assert_same(outputs(model), torch.from_numpy(np.load(tmp_path / "out.npy")))


def test_exported_and_proved(tmp_path):
    model = YOLO(str(model_yaml(tmp_path, "trunk")))
    randomize_norms(model.model)
    model.model.args = {"imgsz": 64}
    model.ckpt = {"train_args": {"imgsz": 64}}
    model.save(tmp_path / "best.pt")
    assert main([str(tmp_path / "best.pt"), "--no-latency"]) == 0
    report = json.loads((tmp_path / "best_deploy_report.json").read_text())
    counts = report["counts"]
    assert (counts["before"]["multi_branch_layers"], counts["after"]["multi_branch_layers"]) == (MULTI_BRANCH["trunk"], 0)
    assert [layer["path"] for layer in report["layers"]][:3] == ["model.0.stem.0", "model.0.stage1.0", "model.0.stage2.0"]
    assert all(layer["ok"] for layer in report["layers"]) and report["artifacts"]["onnx"]["proved"]


# ---- trained -------------------------------------------------------------------------------------------------------------


class Killed(RepTrainer):
    """Stopped after its first epoch."""

    def save_model(self):
        super().save_model()
        raise KeyboardInterrupt


def test_trained_and_resumed(tmp_path, tiny_data):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        YOLO(str(model_yaml(tmp_path, "trunk"))).train(trainer=Killed, **train_args(tiny_data, tmp_path))
    before = torch.load(tmp_path / "run" / "weights" / "last.pt", weights_only=False)["ema"].float()
    YOLO(tmp_path / "run" / "weights" / "last.pt").train(trainer=RepTrainer, resume=True)
    best = checkpoint.load_precise(tmp_path / "run" / "weights" / "best.pt").model
    assert len(multi_branch(best)) == MULTI_BRANCH["trunk"] and type(best.model[0]).__name__ == "RepVGG"
    moved = {key for key, value in best.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert any("stem.0.branches.1x1" in key for key in moved)
    assert multi_branch(YOLO(tmp_path / "run" / "weights" / "best_deploy.pt").model) == []

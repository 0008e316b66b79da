"""Weights under other people's names: loaded, their networks and ours give equal outputs at every stage, in every form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import foreign_models as theirs
import pytest
import timm
import torch
from timm.models import byobnet
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML
from yolo_helpers import noise, randomize_norms

import rep_backbones
from rep_backbones.rules import multi_branch
from rep_backbones.weights import load_weights
from rep_backbones.yolo.rebuild import parse

FORMS = ["training", "merged"]


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In eval mode, with random weights, and statistics that a wrong fold cannot hide behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_norms(build(), seed).eval()


def backbone(name: str, **size: Any) -> nn.Module:
    return made(lambda: rep_backbones.create_backbone(name, num_classes=10, **size), seed=1)


def detector(name: str, **changes: Any) -> nn.Module:
    """An EfficientRep of a YAML in `cfg/` an eighth as wide as the large one, with a third of its layers."""
    config = YAML.load(f"cfg/{name}.yaml")
    config.update(scales={"t": [0.34, 0.125, 1024]}, scale="t", nc=3, **changes)
    return made(lambda: DetectionModel(config, verbose=False), seed=1)


@torch.no_grad()
def outputs(model: nn.Module, parts: list[nn.Module], x: Tensor) -> list[Tensor]:
    """What some parts of a model give."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [part.register_forward_hook(lambda part, _, output: seen.update({part: output})) for part in parts]
    result = model(x)
    for handle in handles:
        handle.remove()
    return [seen[part] for part in parts] + ([result] if isinstance(result, Tensor) else [])


def stages(model: nn.Module) -> list[nn.Module]:
    return [child for name, child in model.named_children() if name.startswith("st")]  # stem, stages


def rows(model: Any, *indices: int) -> list[nn.Module]:
    return [model.model[index] for index in indices]


def equal(expected: list[Tensor], found: list[Tensor]) -> None:
    """Each within 1e-5 of its own range."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found):
        spread = float(a.max() - a.min())
        assert spread > 1e-3, "an output that is constant shows nothing"
        assert float((a - b).abs().max()) <= 1e-5 * spread


def test_the_merged_form_of_these_models_is_right() -> None:
    model = made(lambda: theirs.RepVGG((16, 16, 32, 32, 64), (2, 2, 2, 1), groups=2, se=True))
    with torch.no_grad():
        before = model(noise())
        equal(before, theirs.deployed(model)(noise()))
    assert not any("rbr_dense" in key for key in model.state_dict())


# ---- timm ----------------------------------------------------------------------------------------------------------------


def timm_repvgg(name: str, channels: list[int], repeats: list[int]) -> nn.Module:
    """A definition of timm's with other widths and depths."""
    config = byobnet.model_cfgs[name]
    blocks = tuple(dataclasses.replace(b, c=c, d=d) for b, c, d in zip(config.blocks, channels[1:], repeats))
    return byobnet.ByobNet(dataclasses.replace(config, blocks=blocks, stem_chs=channels[0]), num_classes=10)


def timm_stages(model: Any) -> list[nn.Module]:
    return [model.stem, *model.stages]


def check_timm(theirs: nn.Module, ours: nn.Module, source_form: str, target_form: str) -> None:
    source = theirs if source_form == "training" else timm.utils.reparameterize_model(theirs)
    target = ours if target_form == "training" else rep_backbones.fuse(ours)
    report = load_weights(target, source.state_dict())
    assert not report.unused and not report.missing
    assert bool(report.folded) == ((source_form, target_form) == ("training", "merged"))
    assert bool(report.unfolded) == ((source_form, target_form) == ("merged", "training"))
    assert bool(multi_branch(target)) == (target_form == "training")
    x = noise(size=32).to(next(theirs.parameters()))
    equal(outputs(source, timm_stages(source), x), outputs(target, stages(target), x))


@pytest.mark.parametrize("target_form", FORMS)
@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_b1g4", "repvgg_d2se"])
def test_timms_repvgg(name: str, source_form: str, target_form: str) -> None:
    # with even numbers of layers, as timm counts the grouped ones in each stage anew
    size = {"width": 0.25, "depth": 0.6} if name == "repvgg_b1g4" else {"width": 0.5, "depth": 0.1}
    ours: Any = backbone(name, **size)
    count = [len(stage) for stage in stages(ours)][1:]
    check_timm(made(lambda: timm_repvgg(name, ours.channels, count)), ours, source_form, target_form)


@pytest.mark.parametrize(
    ("name", "source_form", "target_form"),
    [
        ("repvgg_a0", "merged", "training"),
        ("mobileone_s0", "training", "merged"),
        ("mobileone_s4", "training", "training"),
    ],
)
def test_timms_own_sizes(name: str, source_form: str, target_form: str) -> None:
    check_timm(made(lambda: timm.create_model(name, num_classes=10)), backbone(name), source_form, target_form)


@pytest.mark.slow
@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "mobileone_s0", "mobileone_s4"])
def test_timms_own_sizes_in_each_form(name: str, source_form: str) -> None:
    for target_form in FORMS:
        theirs = made(lambda: timm.create_model(name, num_classes=10)).double()
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data *= 0.5  # else rounding grows without bound in the 47 layers of the deepest
        check_timm(theirs, backbone(name).double(), source_form, target_form)


# ---- the authors' ---------------------------------------------------------------------------------------------------------


def authors_repvgg(name: str) -> tuple[nn.Module, nn.Module]:
    ours: Any = backbone(name, width=0.25, depth=0.2)
    count = [len(stage) for stage in stages(ours)][1:]
    groups, se = (4 if "g4" in name else 1), name.endswith("se")
    return made(lambda: theirs.RepVGG(ours.channels, count, groups=groups, se=se)), ours


def authors_mobileone(name: str) -> tuple[nn.Module, nn.Module]:
    ours: Any = backbone(name, width=0.25, depth=0.2)
    count = [len(stage) // 2 for stage in stages(ours)][1:]
    gated = (0, 0, count[2] // 2, count[3]) if name == "mobileone_s4" else (0, 0, 0, 0)
    n = 4 if name == "mobileone_s0" else 1
    return made(lambda: theirs.MobileOne(ours.channels, count, n, gated)), ours


@pytest.mark.parametrize("target_form", FORMS)
@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "mobileone_s0", "mobileone_s4"])
def test_the_authors_names(name: str, source_form: str, target_form: str) -> None:
    source, ours = (authors_repvgg if "repvgg" in name else authors_mobileone)(name)
    if source_form == "merged":
        theirs.deployed(source)
    target = ours if target_form == "training" else rep_backbones.fuse(ours)
    report = load_weights(target, dict(reversed(source.state_dict().items())))  # in whatever order a file has them
    assert report.format.endswith("authors'") and not report.unused and not report.missing
    with torch.no_grad():
        equal(source(noise()), outputs(target, stages(target), noise()))


# ---- YOLOv6, YOLOv7 -------------------------------------------------------------------------------------------------------

V6_WIDTHS, V6_REPEATS = (8, 16, 32, 64, 128), (2, 4, 6, 2)
V6: dict[str, tuple[str, tuple[Any, ...]]] = {
    "n": ("efficientrep", (0, theirs.RepVGGBlock, True)),
    "n of 0.3": ("efficientrep", (0, theirs.RepVGGBlock, False)),
    "m": ("efficientrep-m", (0.667, theirs.RepVGGBlock, True)),
    "l": ("efficientrep-l", (0.5, theirs.Silu, True)),
}


def v6(size: str) -> Any:
    return made(lambda: theirs.YOLOv6(V6_WIDTHS, V6_REPEATS, *V6[size][1]))


@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("size", V6)
def test_yolov6(size: str, source_form: str) -> None:
    source, target = v6(size), detector(V6[size][0])
    if source_form == "merged":
        theirs.deployed(source)
    report = load_weights(target, source.state_dict())
    assert report.format == "YOLOv6's"
    assert all(key.startswith("detect.") for key in report.unused) and report.unused
    assert all(key.startswith("model.32.") for key in report.missing) and report.missing
    with torch.no_grad():
        equal(source(noise()), outputs(target, rows(target, 0, 2, 4, 6, 9, 25, 28, 31), noise()))


def test_yolov6_into_a_fused_model() -> None:
    source, target = v6("m"), rep_backbones.fuse(detector("efficientrep-m"))
    assert load_weights(target, source.state_dict()).folded
    with torch.no_grad():
        equal(source(noise()), outputs(target, rows(target, 0, 2, 4, 6, 9, 25, 28, 31), noise()))


def test_yolov6s_trunk_alone() -> None:
    source, ours = v6("n"), made(lambda: rep_backbones.create_backbone("efficientrep_n", features_only=True, width=0.5), 1)
    report = load_weights(ours, source.state_dict())
    assert all(key.startswith(("neck.", "detect.")) for key in report.unused)
    with torch.no_grad():
        equal(source(noise())[:5], ours(noise()))


@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("target_form", FORMS)
def test_yolov7(source_form: str, target_form: str) -> None:
    source = made(theirs.YOLOv7)
    if source_form == "merged":
        theirs.deployed(source)
    target = made(lambda: DetectionModel(dict(theirs.YOLOv7.YAML), verbose=False), seed=1)
    if target_form == "merged":
        target = rep_backbones.fuse(target)
    report = load_weights(target, source.state_dict())
    assert report.format == "YOLOv7's"
    assert all(key.startswith("model.9.") for key in (*report.unused, *report.missing))
    with torch.no_grad():
        equal(source(noise()), outputs(target, rows(target, *range(9)), noise()))


PYRAMID = ("cv1", "cv3", "cv4", "cv5", "cv6", "cv2", "cv7")  # as SPPCSPC registers them here
RENAMED = {"kxk.conv": "rbr_dense.0", "kxk.bn": "rbr_dense.1", "1x1.conv": "rbr_1x1.0", "1x1.bn": "rbr_1x1.1"}


def v7_names(row: nn.Module) -> dict[str, Tensor]:
    """A row's tensors under the names of the published code."""
    layers: list[str] = []
    named = {}
    for key, tensor in row.state_dict().items():
        layer, kind, name = re.fullmatch(r"(.*?)((?:kxk\.|1x1\.)?(?:conv|bn))\.(\w+)", key).groups()  # type: ignore[union-attr]
        layers += [] if layer in layers else [layer]
        inside = f"{PYRAMID[layers.index(layer)]}." if type(row).__name__ == "SPPCSPC" else ""
        named[f"{inside}{RENAMED.get(kind, kind)}.{name}"] = torch.zeros(tensor.shape)
    return named


@pytest.mark.parametrize("name", ["yolov7-tiny", "yolov7", pytest.param("yolov7x", marks=pytest.mark.slow)])
def test_the_published_rows_of_yolov7_meet_those_of_our_yamls(name: str) -> None:
    layers, _ = parse(YAML.load(f"cfg/{name}.yaml"))
    tensors = {f"model.{i}.{key}": tensor for i, row in enumerate(layers[:-1]) for key, tensor in v7_names(row).items()}
    model = nn.ModuleDict({"model": layers.to_empty(device="cpu")})
    report = load_weights(model, {**tensors, f"model.{len(layers) - 1}.anchor_grid": torch.zeros(1)})
    assert report.unused == (f"model.{len(layers) - 1}.anchor_grid",)
    assert {key.split(".")[1] for key in report.missing} == {str(len(layers) - 1)}


# ---- what no file says ----------------------------------------------------------------------------------------------------


def test_another_eps_changes_nothing() -> None:
    """RepVGG trains with an eps of 1e-5; Ultralytics sets 1e-3 in all norms of a model. Small variances tell."""
    config = {
        "nc": 3,
        "backbone": [[-1, 1, "RepVGGBlock", [8, 3, 2]], *([-1, 1, "RepVGGBlock", [16, 3, 2]] for _ in range(4))],
        "head": [[[2, 4], 1, "Detect", ["nc"]]],
    }
    source, target = made(lambda: theirs.RepVGG((8, 16, 16, 16, 16), (1, 1, 1, 1))), DetectionModel(config, verbose=False)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var *= 1e-3  # type: ignore[operator]
            module.weight.data *= 0.03
    load_weights(target, source.state_dict())
    assert {m.eps for m in target.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    with torch.no_grad():
        equal(source(noise())[:5], outputs(target.eval(), rows(target, 0, 1, 2, 3, 4), noise()))


def test_a_merged_file_leaves_the_other_branches_silent() -> None:
    source, ours = authors_repvgg("repvgg_a0")
    load_weights(ours, theirs.deployed(source).state_dict())
    block: Any = ours.get_submodule("stage1.0")
    branches = dict(block.branches.items())
    assert set(branches) == {"kxk", "1x1"}
    assert float(branches["1x1"].bn.weight.detach().abs().max()) == 0.0
    assert torch.equal(branches["kxk"].conv.weight, source.get_submodule("stage1.0.rbr_reparam").weight)
    norm = branches["kxk"].bn
    assert float(norm.running_mean.abs().max()) == 0.0 and torch.equal(norm.running_var, torch.ones_like(norm.running_var))


def test_a_convolution_with_a_bias_in_front_of_its_norm() -> None:
    """Size l of YOLOv6 0.2: the bias of the convolution is one more term of the norm's mean."""
    source, target = v6("l"), detector("efficientrep-l")
    conv = source.backbone.stem.block.conv
    conv.bias = nn.Parameter(torch.randn(8))
    load_weights(target, source.state_dict())
    with torch.no_grad():
        equal(source(noise())[:2], outputs(target, rows(target, 0, 2), noise()))


# ---- our own --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_form", FORMS)
@pytest.mark.parametrize("source_form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_d2se", "mobileone_s0", "efficientrep_m"])
def test_our_own_names(name: str, source_form: str, target_form: str) -> None:
    source = backbone(name, width=0.25, depth=0.2)
    expected = outputs(source, stages(source), noise())
    target = made(lambda: rep_backbones.create_backbone(name, num_classes=10, width=0.25, depth=0.2), seed=2)
    if source_form == "merged":
        source = rep_backbones.fuse(source)
    if target_form == "merged":
        target = rep_backbones.fuse(target)
    shuffled = dict(
        sorted(source.state_dict().items(), key=lambda item: item[0][::-1])
    )  # safetensors has an order of its own
    report = load_weights(target, shuffled)
    assert report.format == "our own" and not report.unused and not report.missing
    equal(expected, outputs(target, stages(target), noise()))


def test_a_trunk_in_a_detector() -> None:
    """One row of a YAML is the whole trunk; the last layer and the rows behind are named."""
    source, ours = authors_repvgg("repvgg_a0")
    config = {
        "nc": 3,
        "backbone": [[-1, 1, "RepVGG", ["a0", 0.25, 0.2]], [0, 1, "Index", [None, 5]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }
    target: Any = made(lambda: DetectionModel(config, verbose=False), seed=1)
    report = load_weights(target, source.state_dict())
    assert report.unused == ("linear.weight", "linear.bias")
    assert all(key.startswith("model.2.") for key in report.missing)
    with torch.no_grad():
        equal(source(noise())[:5], outputs(target, stages(target.model[0]), noise()))


def test_half_precision_and_training_mode_are_kept() -> None:
    source, ours = authors_repvgg("repvgg_a0")
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in source.state_dict().items()}
    load_weights(ours.train(), half)
    assert ours.training and {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.get_parameter("head.weight"), half["linear.weight"].float())

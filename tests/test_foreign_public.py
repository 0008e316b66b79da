"""Public blocks that have no rule here, measured: timm's own reparameterize, and Ultralytics' fuse, are the yardstick."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import byobnet, efficientvit_msra, fastvit, levit, repghost, repvit
from timm.utils import reparameterize_model
from torch import Tensor, nn
from ultralytics.nn.modules import C2fCIB, RepC3, RepConv, RepNCSPELAN4, RepVGGDW
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel
from yolo_helpers import randomize_norms

from rep_backbones import fuse
from rep_backbones.foreign.cost import Cost, cost, tensors_in
from rep_backbones.foreign.fusing import Found, fuse_measured
from rep_backbones.fuse import report
from rep_backbones.rules import VIEWS

C = 8
LAYERS = byobnet.LayerFn()
TIMM: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": lambda: byobnet.RepVggBlock(C, C, layers=LAYERS),
    "RepVGG, stride 2, groups": lambda: byobnet.RepVggBlock(C, C, stride=2, group_size=4, layers=LAYERS),
    "MobileOne, depthwise": lambda: byobnet.MobileOneBlock(C, C, num_conv_branches=4, group_size=1, layers=LAYERS),
    "MobileOne, pointwise": lambda: byobnet.MobileOneBlock(C, C, kernel_size=1, num_conv_branches=4, layers=LAYERS),
    "RepViT": lambda: repvit.RepVggDw(C, 3),
    "RepViT, legacy": lambda: repvit.RepVggDw(C, 3, legacy=True),
    "RepViT, whole block": lambda: repvit.RepViTBlock(C, 2, 3, True, nn.GELU),
    "FastViT, MobileOne": lambda: fastvit.MobileOneBlock(C, C, 3, use_se=True),
    "FastViT, mixer": lambda: fastvit.RepMixer(C),
    "FastViT, large kernel": lambda: fastvit.ReparamLargeKernelConv(C, C, 7, 2, 1, small_kernel=3, act_layer=nn.GELU),
    "FastViT, position": lambda: fastvit.RepConditionalPosEnc(C),
    "RepGhost": lambda: repghost.RepGhostModule(C, C),
    "RepGhost, bottleneck": lambda: repghost.RepGhostBottleneck(C, 2 * C, C, se_ratio=0.25),
    "LeViT": lambda: levit.LevitMlp(C, 2 * C, use_conv=True, act_layer=nn.Hardswish),
    "EfficientViT, feed forward": lambda: efficientvit_msra.ResidualDrop(efficientvit_msra.ConvMlp(C, 2 * C)),
    "EfficientViT, merging": lambda: efficientvit_msra.PatchMerging(C, 2 * C),
}
ULTRALYTICS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the convolutions of the fused form
    "RepConv": (lambda: RepConv(C, C), 1),
    "RepConv with identity": (lambda: RepConv(C, C, bn=True), 1),
    "RepVGGDW": (lambda: RepVGGDW(C), 1),
    "RepC3": (lambda: RepC3(C, C, n=2), 4),
    "RepNCSPELAN4": (lambda: RepNCSPELAN4(C, C, 8, 8, 1), 14),
    "C2fCIB": (lambda: C2fCIB(C, C, 1, True, True), 7),
}


def costs(model: nn.Module, x: Tensor) -> Cost:
    with torch.no_grad():
        return cost(lambda: model(x.clone()))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_norms(build()).eval()


def far(a: Any, b: Any) -> float:
    pairs = zip(tensors_in(a), tensors_in(b), strict=True)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


def errors(found: list[Found]) -> list[float]:
    return [f.error for f in found if f.error is not None]


@pytest.mark.parametrize("name", TIMM)
def test_a_block_of_timm_is_fused_as_timm_does(name: str) -> None:
    model = made(TIMM[name])
    x = torch.randn(1, C, 12, 12)
    theirs = reparameterize_model(nn.Sequential(model)).eval()
    ours, _, found = report(nn.Sequential(model).eval(), foreign="measure", example=x)
    a, b = costs(ours, x), costs(theirs, x)
    assert a.convs <= b.convs and a.steps <= b.steps and a.flops <= b.flops
    assert all(error < 1e-11 for error in errors(found)) and a.steps < costs(model, x).steps
    with torch.no_grad():
        for n, (h, w) in enumerate([(12, 12), (9, 17), (16, 10)]):
            x = torch.randn(2, C, h, w, generator=torch.Generator().manual_seed(n))
            assert far(model(x), ours(x)) < 1e-5 and far(theirs(x), ours(x)) < 1e-5


@pytest.mark.parametrize("name", ULTRALYTICS)
def test_a_block_of_ultralytics_is_measured_as_the_rules_have_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, convs = ULTRALYTICS[name]
    model = made(build)
    x = torch.randn(1, C, 12, 12)
    by_rule = fuse(model)
    for kind in (RepConv, RepVGGDW):
        monkeypatch.delitem(VIEWS, kind)
    measured, _, found = report(model, foreign="measure", example=x)
    assert costs(measured, x).convs == costs(by_rule, x).convs == convs < costs(model, x).convs
    assert errors(found) and max(errors(found)) < 1e-11
    with torch.no_grad():
        for h, w in [(12, 12), (9, 17)]:
            x = torch.randn(2, C, h, w)
            assert far(model(x), measured(x)) < 1e-5 and far(by_rule(x), measured(x)) < 1e-5


MODELS = [
    ("repvgg_a0", 32, {}),
    ("mobileone_s0", 32, {}),
    ("repvit_m0_9", 64, {}),
    ("fastvit_t8", 64, {}),
    ("repghostnet_050", 64, {}),
    ("levit_conv_128s", 64, {"img_size": 64}),
    ("efficientvit_m0", 64, {"img_size": 64}),
    ("efficientvit_b0", 64, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "options"), MODELS, ids=[name for name, _, _ in MODELS])
def test_a_model_of_timm_has_no_more_layers_than_timm_leaves(name: str, side: int, options: dict[str, int]) -> None:
    model = made(lambda: timm.create_model(name, **options))
    x = torch.randn(1, 3, side, side)
    theirs = reparameterize_model(copy.deepcopy(model))
    ours, _, found = report(model, foreign="measure", example=x)
    assert costs(ours, x).convs <= costs(theirs, x).convs
    assert max(errors(found)) < 1e-10
    with torch.no_grad():
        assert far(model(x), ours(x)) < 1e-4 and far(theirs(x), ours(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("yolov9t", 186), ("yolov10n", 107), ("rtdetr-l", 110)])
def test_a_model_of_ultralytics_by_measurement_alone(name: str, left: int) -> None:
    task = RTDETRDetectionModel if name.startswith("rtdetr") else DetectionModel
    model = made(lambda: task(f"{name}.yaml", verbose=False))
    x = torch.rand(1, 3, 64, 64)
    measured, found = fuse_measured(copy.deepcopy(model), x)
    by_rule = fuse(model)
    assert costs(measured, x).convs == costs(by_rule, x).convs == left < costs(model, x).convs
    assert type(measured) is type(model) and max(errors(found)) < 1e-10
    with torch.no_grad():
        a, b = (list(tensors_in(m.double()(x.double()))) for m in (measured, by_rule))
    assert a and all(torch.allclose(p, q, rtol=0, atol=1e-3 * float(p.abs().max())) for p, q in zip(a, b))

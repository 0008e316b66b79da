"""Layers without a rule: what is affine is found, proved and merged, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from awkward_blocks import AFFINE, BENT, Bent, C, PlusEquals, TorchAdd, Two
from hypothesis import given
from strategies import laws, maps, numbers, same
from torch import Tensor, nn
from yolo_helpers import randomize_norms

from rep_backbones import fuse
from rep_backbones.affine import AffineConv
from rep_backbones.foreign import fusing
from rep_backbones.foreign.cost import tensors_in
from rep_backbones.foreign.fusing import fuse_measured
from rep_backbones.foreign.measure import NotAConvolution, measured
from rep_backbones.foreign.prove import Unproved, pictures, proved
from rep_backbones.foreign.record import record
from rep_backbones.fuse import report
from rep_backbones.rules import FoldError


def convs(model: nn.Module, x: Tensor) -> int:
    """Convolutions that run, wherever they are called."""
    return record(model, lambda: model(x.clone()))[model].convs


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_norms(build()).eval()


def compare(model: nn.Module, fused: nn.Module, atol: float = 1e-10) -> None:
    """In float64, on sizes that the fusing has not seen, borders included."""
    model, fused = copy.deepcopy(model).double(), copy.deepcopy(fused).double()
    with torch.no_grad():
        for n, (h, w) in enumerate([(9, 9), (9, 9), (11, 16), (6, 5), (40, 13)]):
            x = numbers(n, 2, C, h, w) * (1 + n)
            try:
                expected = next(tensors_in(model(x.clone())))
            except RuntimeError:  # of one size only
                continue
            got = next(tensors_in(fused(x)))
            assert expected.shape == got.shape
            assert float((expected - got).abs().max()) <= atol * float(expected.abs().max())


# ---- measuring -----------------------------------------------------------------------------------------------------------


@given(maps())
@laws(25)
def test_a_kernel_is_recovered(value: AffineConv) -> None:
    found = measured(value, value.in_channels)
    kept = tuple(d if k > 1 else 1 for d, k in zip(value.dilation, value.kernel_size))
    assert (found.kernel_size, found.stride, found.padding) == (value.kernel_size, value.stride, value.padding)
    assert (found.dilation, found.groups) == (kept, value.groups)
    same(found.weight, value.weight, 1e-12)
    assert (value.bias is None) == (found.bias is None)
    if value.bias is not None and found.bias is not None:
        same(found.bias, value.bias, 1e-12)


@given(maps())
@laws(40)
def test_tightened_undoes_what_enlarges(value: AffineConv) -> None:
    kernel, padding = value.undilated().kernel_size, value.padding
    wide = value.dense().undilated().embedded((kernel[0] + 4, kernel[1] + 2), (padding[0] + 2, padding[1] + 1))
    tight = wide.tightened()
    assert (tight.kernel_size, tight.padding, tight.groups) == (value.kernel_size, value.padding, value.groups)
    x = numbers(0, 1, value.in_channels, 17, 16)
    same(tight(x), value(x))


@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [0], [4], [0, 4], [1, 3], [2, 3], []])
def test_tightened_keeps_the_map(rows: list[int]) -> None:
    weight = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    weight[:, :, rows, 2] = numbers(0, 2, 3, len(rows))
    for padding in (0, 1, 2):
        value = AffineConv(weight, padding=(padding, padding))
        x = numbers(1, 1, 3, 9, 7)
        same(value.tightened()(x), value(x))
        assert sum(value.tightened().kernel_size) < 10


def test_a_loud_bias_does_not_drown_a_quiet_kernel() -> None:
    value = AffineConv(numbers(0, 3, 2, 3, 3) * 1e-9, numbers(1, 3) * 1e6, padding=(1, 1))
    found = measured(value, 2)
    same(found.weight / 1e-9, value.weight / 1e-9, 1e-8)
    assert found.kernel_size == (3, 3)


def test_measuring_keeps_within_its_memory() -> None:
    value = AffineConv(numbers(0, 2, 24, 17, 17), padding=(8, 8))
    most = 0

    def watched(x: Tensor) -> Tensor:
        nonlocal most
        most = max(most, x.shape[0])
        return value(x)

    same(measured(watched, 24, memory=1).weight, value.weight, 0)
    assert most == 1, "one picture at a time"
    measured(watched, 24, memory=1 << 30)
    assert most == 24, "all at once"


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: x.mean((2, 3)), "does not make pictures"),
        (lambda x: x.mean((2, 3), keepdim=True), "does not grow"),
        (lambda x: nn.functional.interpolate(x, scale_factor=2.0), "not that of any convolution"),
        (lambda x: x + torch.arange(x.shape[3]), "differs from pixel to pixel"),
        (lambda x: x.relu(), "no kernel explains"),
        (lambda x: x[:, :, :3], "does not grow"),
        (lambda x: x / 0, "NaN or inf"),
        (lambda x: x + x.mean((2, 3), keepdim=True), "no kernel explains"),
        (lambda x: torch.zeros(1, 2, 3, 4) @ x, "fails on a picture"),
    ],
)
def test_what_no_convolution_answers_is_refused(f: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotAConvolution, match=reason):
        measured(f, 2)


# ---- proving -------------------------------------------------------------------------------------------------------------

RIGHT = AffineConv(numbers(0, 4, 2, 3, 3), numbers(1, 4), (2, 1), (1, 1), groups=2)
WRONG = {
    "a tap": replace(RIGHT, weight=RIGHT.weight + torch.eye(3, dtype=torch.float64) * 1e-7),
    "a corner": replace(RIGHT, weight=RIGHT.weight.index_fill(3, torch.tensor([2]), 0)),
    "the bias": RIGHT.shifted(torch.tensor([0, 0, 0, 1e-7], dtype=torch.float64)),
    "the padding": replace(RIGHT.embedded((5, 5), (2, 2)), padding=(1, 2)),
    "the stride": replace(RIGHT, stride=(1, 2)),
    "the dilation": replace(RIGHT, dilation=(1, 2), padding=(1, 2)),
    "the groups": replace(RIGHT.dense(), weight=RIGHT.dense().weight + 1e-7),
    "NaN": replace(RIGHT, bias=torch.full((4,), float("nan"), dtype=torch.float64)),
}


def test_the_right_kernel_is_proved() -> None:
    assert proved(RIGHT, RIGHT.dense(), pictures(RIGHT)) < 1e-14


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_not_proved(what: str) -> None:
    with pytest.raises(Unproved):
        proved(RIGHT, WRONG[what], pictures(RIGHT))


@pytest.mark.parametrize(
    "original",
    [
        lambda x: RIGHT(x) * x.shape[0],
        lambda x: RIGHT(x.clamp(-1e5, 1e5)),
        lambda x: RIGHT(x + 1e-3 * (x.abs() < 1e-3)),
        lambda x: RIGHT(x) + (x.shape[3] > 5),
    ],
    ids=["several pictures", "loud ones", "quiet ones", "large ones"],
)
def test_pictures_are_of_many_kinds(original: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Unproved):
        proved(original, RIGHT, pictures(RIGHT))


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_measurement_is_not_merged(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = RIGHT.to_conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * 0.5 + self.conv(x) * 0.5

    model, x = Same().eval(), torch.randn(1, 4, 9, 9, dtype=torch.float64)
    monkeypatch.setattr(fusing, "measured", lambda *_: RIGHT)
    assert fuse_measured(copy.deepcopy(model), x)[1][0].outcome == "merged"
    monkeypatch.setattr(fusing, "measured", lambda *_: WRONG[what])
    same_model, found = fuse_measured(model, x)
    assert same_model is model and [f.outcome for f in found] == ["left"]


# ---- whole blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "left"), AFFINE, ids=[build.__name__ for build, _ in AFFINE])  # type: ignore[attr-defined]
def test_an_awkward_block_is_one_convolution(build: Callable[[], nn.Module], left: int) -> None:
    model, x = made(build), torch.randn(1, C, 10, 10)
    fused, _, found = report(model, foreign="measure", example=x)
    assert convs(fused, x) == left < convs(model, x) + (build.__name__ in ("KernelInForward", "SpaceToDepth", "Tokens"))  # type: ignore[attr-defined]
    compare(model, fused, 1e-6)  # the kernels are stored in float32
    exact = fuse(model.double(), foreign="measure", example=x.double())
    compare(model, exact)
    assert found and all(f.outcome == "merged" and f.error is not None and f.error < 1e-12 for f in found)


@pytest.mark.parametrize("name", BENT)
def test_what_is_no_convolution_stays(name: str) -> None:
    model, x = made(lambda: Bent(BENT[name])), torch.randn(1, C, 9, 9)
    fused, _, found = report(model, foreign="measure", example=x)
    assert convs(fused, x) == convs(model, x) >= 2
    if name != "a random mask":
        compare(model, fused)
    assert all(f.outcome == "left" and f.reason for f in found)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("activation in a branch", r"relu \(relu\) in front of its sum is not affine"),
        ("written into the input", "writes into its input"),
        ("clipped far out", "is off by|not affine"),
        ("other above a size", "another|is off by"),
        ("a random mask", "no kernel explains|not affine|is off by"),
    ],
)
def test_what_is_left_has_a_reason(name: str, reason: str) -> None:
    found = fuse_measured(made(lambda: Bent(BENT[name])), torch.randn(1, C, 9, 9))[1]
    assert found[0].outcome == "left" and found[0].path == "the model" and found[0].type == "Bent"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found[0].reason)


def test_the_fused_form_is_plain_torch() -> None:
    fused = fuse(made(PlusEquals), foreign="measure", example=torch.randn(1, C, 8, 8))
    assert [type(m) for m in fused.modules()] == [nn.Sequential, nn.Conv2d, nn.SiLU]


class Chain(nn.Module):
    """A depthwise and a pointwise convolution: one dense convolution would take more FLOPs."""

    def __init__(self, c: int, wide: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(c, wide, 3, padding=1, groups=c, bias=False)
        self.point = nn.Conv2d(wide, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.depth(x)) + 1


def test_a_chain_is_collapsed_only_where_it_costs_no_more() -> None:
    x = torch.randn(1, C, 8, 8)
    kept = made(lambda: Chain(C, C))
    assert convs(fuse(kept, foreign="measure", example=x), x) == 2
    wide = made(lambda: Chain(C, 16 * C))
    fused, _, found = report(wide, foreign="measure", example=x)
    assert convs(fused, x) == 1 and found[0].gained == "3 steps -> 1, 83% fewer FLOPs"
    compare(wide, fused, 1e-6)


class NormRelu(nn.Module):
    """A norm and an activation in one module."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


def conv(k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, k, **options)


def twice(shared: nn.Module) -> nn.Sequential:
    """Its first layer stands behind its third one too."""
    return nn.Sequential(shared, nn.ReLU(), conv(), shared)


def test_a_series_with_nothing_to_merge_costs_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise AssertionError("it is taken apart")

    monkeypatch.setattr(fusing._Work, "_taken_apart", none)
    block = nn.Sequential(conv(3), nn.ReLU())
    model = made(lambda: nn.Sequential(block, nn.Sequential(conv(), nn.SiLU(), conv(3)), nn.ReLU(), conv()))
    runs: list[Any] = []
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: (runs.append(x), nn.functional.silu(x))[1])
    fused, found = fuse_measured(model, torch.rand(1, C, 9, 9))
    assert fused is model and found == [] and len(runs) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU()),
        lambda: nn.Sequential(nn.ReLU(), conv(3), NormRelu(C)),
        lambda: twice(conv()),
    ],
    ids=["norm", "norm and activation", "shared"],
)
def test_neighbours_in_a_series_are_looked_at(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fused, found = fuse_measured(copy.deepcopy(model), torch.rand(1, C, 9, 9))
    compare(model, fused, 1e-5)
    assert [each.outcome for each in found] == ["merged"]


# ---- the model around ----------------------------------------------------------------------------------------------------


class Parent(nn.Module):
    """Reads what only the old block had."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.plain = PlusEquals(), TorchAdd()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.plain(self.asked(x)) * float(self.asked.a[0].weight.shape[0])]


def test_a_block_whose_attributes_are_read_is_taken_back() -> None:
    model, x = made(Parent), torch.randn(1, C, 8, 8)
    fused, _, found = report(model, foreign="measure", example=x)
    assert type(fused.asked) is PlusEquals and type(fused.plain) is nn.Conv2d
    compare(model, fused, 1e-6)
    assert {f.path: f.outcome for f in found} == {"asked": "left", "plain": "merged"}
    assert "the model fails with it merged (AttributeError" in next(f.reason for f in found if f.path == "asked")


def test_a_block_in_two_places_is_measured_once_and_stays_one() -> None:
    block = made(TorchAdd)
    model, x = nn.Sequential(block, nn.ReLU(), block).eval(), torch.randn(1, C, 8, 8)
    fused, _, found = report(model, foreign="measure", example=x)
    assert fused[0] is fused[2] and type(fused[0]) is nn.Conv2d and len(found) == 1
    compare(model, fused, 1e-6)


@pytest.mark.parametrize("path", ["0", "0.b"])
def test_hooks_are_kept_and_told(path: str) -> None:
    model = nn.Sequential(made(TorchAdd), nn.ReLU()).eval()
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    fused, found = fuse_measured(model, torch.randn(1, C, 8, 8))
    assert type(fused[0]) is TorchAdd and fused.get_submodule(path)._forward_hooks
    told = next(f for f in found if f.outcome == "left")
    assert told.path == path and "forward hooks" in told.reason


def test_types_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "KEPT", {Two})
    fused = fuse(made(TorchAdd), foreign="measure", example=torch.randn(1, C, 8, 8))
    assert type(fused) is TorchAdd


def test_a_copy_unless_in_place() -> None:
    model, x = made(Parent), torch.randn(1, C, 8, 8)
    before = copy.deepcopy(model.state_dict())
    fuse(model, foreign="measure", example=x)
    assert type(model.plain) is TorchAdd
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert fuse(model, foreign="measure", example=x, inplace=True) is model and type(model.plain) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_type_of_the_model_is_kept(dtype: torch.dtype) -> None:
    model = made(TorchAdd).to(dtype).requires_grad_(False)
    fused: Any = fuse(model, foreign="measure", example=torch.randn(1, C, 8, 8, dtype=dtype))
    assert type(fused) is nn.Conv2d and fused.weight.dtype is dtype and not fused.weight.requires_grad


def test_a_kernel_that_does_not_fit_its_type_is_left() -> None:
    block: Any = made(lambda: Bent(lambda m, x: m.a(x) + m.b(x))).half()
    with torch.no_grad():
        block.b.weight.fill_(4e4)
        block.a.weight.fill_(4e4)
    fused, found = fuse_measured(block, torch.zeros(1, C, 9, 9, dtype=torch.float16))
    assert fused is block and "does not fit into torch.float16" in found[0].reason


# ---- the words -----------------------------------------------------------------------------------------------------------


def test_measuring_needs_an_example_that_fits() -> None:
    with pytest.raises(ValueError, match="'measure' needs example="):
        fuse(made(TorchAdd), foreign="measure")
    with pytest.raises(ValueError, match="the model fails on the example .RuntimeError"):
        fuse(made(TorchAdd), foreign="measure", example=torch.randn(1, C + 1, 8, 8))
    with pytest.raises(FoldError, match="train mode"):
        fuse(TorchAdd(), foreign="measure", example=torch.randn(1, C, 8, 8))


def test_refuse_names_the_layers() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    with pytest.raises(
        FoldError, match=r"^0: .*Bare holds 2 convolutions and has no rule; so do 1 \(.*Bare.*foreign='measure'"
    ):
        fuse(nn.Sequential(Bare(), Bare()).eval(), foreign="refuse")
    assert type(fuse(Bare().eval())) is Bare, "kept by default"

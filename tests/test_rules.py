"""Rules match exact types, refuse what has no exact value, and name the culprit; verify judges each output by its range."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rep_backbones import fuse, verify
from rep_backbones.containers import Block, PaddedBatchNorm2d, Parallel, Scale
from rep_backbones.rules import RULES, FoldError, equivalent, in_float64, multi_branch


def shuffled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.1, 2)
    return model.double().eval()


def computes_the_same(module: nn.Module, channels: int = 4) -> bool:
    x = torch.randn(2, channels, 11, 8, generator=torch.Generator().manual_seed(1)).double()
    return torch.allclose(in_float64(module)(x), module(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)),
        nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), PaddedBatchNorm2d(6, 1), nn.Conv2d(6, 4, 3)),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False, groups=4), PaddedBatchNorm2d(4, 1), nn.AvgPool2d(3, 2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), Scale(4, per_channel=True)),
        Parallel({"k": nn.Conv2d(4, 4, 3, padding=1), "one": nn.Conv2d(4, 4, 1), "same": nn.BatchNorm2d(4)}),
        Parallel({"k": nn.Conv2d(4, 4, 3, padding=1), "bare": nn.Identity()}),
        Parallel({"wide": nn.Conv2d(4, 4, (1, 5), padding=(0, 2)), "high": nn.Conv2d(4, 4, (5, 1), padding=(2, 0))}),
        Parallel({"pool": nn.AvgPool2d(3, 1, 1), "k": nn.Conv2d(4, 4, 3, padding=1, groups=2)}),
        Parallel({"inner": Parallel({"a": nn.Conv2d(4, 4, 1), "b": nn.Identity()}), "k": nn.Conv2d(4, 4, 3, padding=1)}),
    ],
    ids="conv-bn bn-conv conv-bn-1x1 1x1-kxk 1x1-avg depthwise repvgg identity acnet pool nested".split(),
)
def test_compositions_have_their_value(module: nn.Module) -> None:
    assert computes_the_same(shuffled(module))


class Twice(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Twice(4, 4, 1), r"Twice has no rule \(types match exactly\).*RULES\[Twice\] = rule"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), "1: .*ReLU has no rule"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "count_include_pad=True, ceil_mode=False"),
        (nn.AvgPool2d(2, ceil_mode=True), "count_include_pad=True, ceil_mode=False"),
        (nn.BatchNorm2d(4, track_running_stats=False), "without running statistics"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), PaddedBatchNorm2d(4, 1), nn.Conv2d(4, 4, 3)), "1: .*not a convolution"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), "1: .*not a convolution at the border"),
        (Parallel({"k": nn.Conv2d(4, 4, 2), "one": nn.Conv2d(4, 4, 1)}), "does not embed"),
        (Parallel({"k": nn.Conv2d(4, 4, 1, 2), "one": nn.Conv2d(4, 4, 1)}), "equal stride"),
        (Parallel({"k": nn.Conv2d(4, 4, 1), "deep": nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU())}), "deep.1: .*SiLU"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_exact_value_is_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(FoldError, match=said):
        equivalent(module.eval(), 4)


def test_a_rule_of_the_user_is_used() -> None:
    RULES[Twice] = lambda module, channels: RULES[nn.Conv2d](module, channels).scaled(torch.full((1,), 2.0).double())
    try:
        assert computes_the_same(shuffled(Parallel({"twice": Twice(4, 4, 3, padding=1), "same": nn.Identity()})))
    finally:
        del RULES[Twice]


class Stage(nn.Module):
    """A layer that a user writes from the same parts: fuses with no further code."""

    def __init__(self) -> None:
        super().__init__()
        branches = Parallel({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))})
        self.block = Block(branches, act=nn.GELU())
        self.attention = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) * self.attention(x).sigmoid()


def test_a_block_of_the_user_fuses() -> None:
    model = shuffled(Stage())
    fused = fuse(model)
    assert verify(model, fused, torch.randn(2, 4, 9, 7).double()) and multi_branch(fused) == []
    assert [type(m) for m in fused.block] == [nn.Conv2d, nn.GELU]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["block.branches.a.weight", "block.branches.b.1.running_var", "block.branches.b.1.bias"])
def test_numbers_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = shuffled(Stage())
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = value
    before = [type(m) for m in model.modules()]
    with pytest.raises(FoldError, match=rf"^{name.replace('.', '[.]')}: 1 of .* NaN or inf"):
        fuse(model, inplace=True)
    assert [type(m) for m in model.modules()] == before, "a model that cannot be fused stays whole"


def test_forward_hooks_are_refused() -> None:
    model = shuffled(Stage())
    handle = model.block.branches.register_forward_hook(lambda *_: None)
    with pytest.raises(FoldError, match=r"block.branches.*forward hooks.*handle\.remove"):
        fuse(model)
    handle.remove()
    fuse(model)


def test_shared_weights_survive_a_fused_copy() -> None:
    """A kernel that stands in a merged layer and elsewhere too."""
    model = shuffled(nn.Sequential(Stage(), nn.Conv2d(4, 4, 3, padding=1)))
    model[1].weight = model[0].block.branches.a.weight
    fused = fuse(model)
    assert verify(model, fused, torch.randn(1, 4, 9, 7).double())
    assert fused[1].weight.data_ptr() != model[1].weight.data_ptr(), "a copy shares nothing with the original"


def test_inplace_and_copy() -> None:
    model = shuffled(Stage())
    fused = fuse(model)
    assert fused is not model and multi_branch(model)
    shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in fused.parameters()}
    assert not shared
    assert fuse(model, inplace=True) is model and not multi_branch(model)


@pytest.mark.parametrize("wrong", ["measured", "", "KEEP"])
def test_foreign_takes_known_words(wrong: str) -> None:
    with pytest.raises(ValueError, match="accepted are 'keep'"):
        fuse(shuffled(Stage()), foreign=wrong)


# ---- verify --------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Boxes up to 640 beside scores near 1e-4."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"boxes": x * 640, "scores": x * 1e-4 + self.wrong}


X = torch.linspace(0, 1, 50).reshape(1, 1, 5, 10)


def test_a_small_output_is_not_hidden_by_a_large_one() -> None:
    assert verify(Two().eval(), Two().eval(), X)
    report = verify(Two().eval(), Two(1e-6).eval(), X)
    assert not report and [d.name for d in report.differences if not d.ok] == ["scores"]
    assert report.error == pytest.approx(1e-2, rel=1e-3)
    assert "FAIL output scores: 1.0e-02" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_the_same(value: float) -> None:
    assert not verify(Two().eval(), Two(value).eval(), X)
    assert not verify(Two(value).eval(), Two(value).eval(), X)


class Ill(nn.Module):
    """Large terms that cancel: float32 rounds more than 1e-5 of the range, as in a model that has barely been trained."""

    def __init__(self, wrong: float = 0.0, turned: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        self.turned = turned
        with torch.no_grad():
            for conv, weight, bias in ((self.one, 0.1, 3000.3), (self.two, 0.3 + wrong, -3000.7)):
                conv.weight.fill_(weight)
                conv.bias.fill_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.two(x) + self.one(x)
            if not self.turned
            else (self.one.weight + self.two.weight) * x + (self.one.bias + self.two.bias)
        )


def test_rounding_of_the_reference_itself_is_no_error() -> None:
    assert verify(Ill().eval(), Ill(turned=True).eval(), X)
    assert not verify(Ill().eval(), Ill(1e-3, turned=True).eval(), X)


def test_a_resolution_is_not_counted() -> None:
    assert verify(Two().eval(), Two(1e-6).eval(), X, resolution=1.001e-6)


def test_verify_refuses_what_proves_nothing() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        verify(Two().eval(), Two().eval(), [])
    with pytest.raises(ValueError, match="candidate is in train mode"):
        verify(Two().eval(), Two(), X)
    with pytest.raises(ValueError, match="has shape"):
        verify(lambda x: x, lambda x: x[:, :, 1:], X)
    with pytest.raises(ValueError, match="must be the same"):
        verify(lambda x: {"a": x}, lambda x: {"b": x}, X)
    assert not verify(lambda x: 3, lambda x: 3, X), "nothing was compared"

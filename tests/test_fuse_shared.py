"""fuse on modules that stand in several places, on plain layers that do not fold, and what it refuses to lose."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fuse import randomized
from torch import nn

from rep_backbones import blocks, equivalent_conv, fuse, verify
from rep_backbones.containers import Block, Concat, Parallel
from rep_backbones.rules import FoldError, branch_names, multi_branch


def conv(k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(4, 4, k, padding=k // 2, **options)


def series_with_one_activation() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(conv(), act, conv(), act, nn.BatchNorm2d(4), blocks.RepConv(4, 4))


def series_with_one_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(conv(), norm, nn.ReLU(), conv(), norm, blocks.RepConv(4, 4))


def one_convolution_two_norms() -> nn.Module:
    both = conv()
    return nn.Sequential(both, nn.BatchNorm2d(4), both, nn.BatchNorm2d(4), blocks.RepConv(4, 4))


def branch_with_one_convolution_twice() -> nn.Module:
    point = conv(1)
    return Block(Parallel({"deep": nn.Sequential(point, point), "kxk": conv()}), act=nn.ReLU())


def norm_in_two_branches() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return Block(Parallel({"kxk": nn.Sequential(conv(), norm), "1x1": nn.Sequential(conv(1), norm), "identity": norm}))


def same_part_twice() -> nn.Module:
    part = conv()
    return nn.Sequential(Concat([part, part]), nn.Conv2d(8, 4, 1))


def block_twice() -> nn.Module:
    block = blocks.RepVGGBlock(4, 4)
    return nn.Sequential(block, conv(), block)


def stage_twice() -> nn.Module:
    stage = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), blocks.DiverseBranchBlock(4, 4))
    return nn.Sequential(stage, nn.Sigmoid(), stage)


class Named(nn.Module):
    """The same block by two names, and a convolution inside and outside a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a = blocks.RepConv(4, 4)
        self.b = self.a
        self.conv = conv()
        self.series = nn.Sequential(self.conv, nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.b(self.series(self.a(x))).relu())


SHARING = [
    series_with_one_activation,
    series_with_one_norm,
    one_convolution_two_norms,
    branch_with_one_convolution_twice,
    norm_in_two_branches,
    same_part_twice,
    block_twice,
    stage_twice,
    Named,
]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("build", SHARING, ids=lambda build: build.__name__)
def test_modules_in_several_places(build, inplace: bool) -> None:
    model = randomized(build())
    before, kept = copy.deepcopy(model), {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model, inplace=inplace)
    assert verify(before, fused, [torch.randn(2, 4, 9, 12).double()])
    assert not multi_branch(fused)
    if not inplace:
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in fused.state_dict().values()}
        assert not shared, "the copy has numbers of its own"


def test_what_was_one_layer_stays_one() -> None:
    fused = fuse(randomized(block_twice()))
    assert fused[0] is fused[2]
    named = fuse(randomized(Named()))
    assert named.a is named.b and type(named.a) is nn.Sequential


def test_equivalent_conv_of_a_convolution_twice() -> None:
    point = randomized(conv(1))
    value, x = equivalent_conv(nn.Sequential(point, point).eval()), torch.randn(1, 4, 5, 5).double()
    torch.testing.assert_close(value(x), point(point(x)))
    assert branch_names(Concat([point, point])) == ["0", "1"]


@pytest.mark.parametrize(
    "plain",
    [
        lambda: nn.Sequential(conv(padding_mode="reflect"), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
    ids=["reflect", "same", "no statistics"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_plain_layers_that_do_not_fold_are_left_as_they_are(plain) -> None:
    model = nn.Sequential(plain(), blocks.RepConv(4, 4)).double().eval()
    fused = fuse(model)
    assert [type(m) for m in fused[0]] == [nn.Conv2d, nn.BatchNorm2d] and not multi_branch(fused)
    assert verify(model, fused, [torch.randn(2, 4, 9, 12).double()])


def test_memory_format_is_kept() -> None:
    model = nn.Sequential(blocks.RepConv(4, 4), conv()).eval()
    assert fuse(model)[0][0].weight.is_contiguous()
    fused = fuse(model.to(memory_format=torch.channels_last))
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in fused.modules() if type(m) is nn.Conv2d)


def test_what_would_be_lost_is_refused() -> None:
    block = blocks.RepConv(4, 4)
    with pytest.raises(FoldError, match="branches.kxk.conv: is in train mode"):
        equivalent_conv(block)
    block.eval()
    inner = block.get_submodule("branches.kxk.conv")
    handle = inner.register_forward_hook(lambda *_: None)
    for verb in (fuse, equivalent_conv):
        with pytest.raises(FoldError, match=r"branches.kxk.conv: has forward hooks.*handle.remove\(\)"):
            verb(block)
    handle.remove()
    inner.forward = lambda x: x
    for verb in (fuse, equivalent_conv):
        with pytest.raises(FoldError, match="branches.kxk.conv: has a forward of its own"):
            verb(block)


def test_a_bias_that_does_not_fit_is_refused() -> None:
    block = blocks.RepConv(4, 4).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 6e4)
    with pytest.raises(FoldError, match="the merged bias does not fit into torch.float16; fuse in float32"):
        fuse(block.half())


def test_a_negative_variance_is_named() -> None:
    block = blocks.RepConv(4, 4).eval()
    block.get_submodule("branches.kxk.bn").running_var[1] = -2.0
    with pytest.raises(FoldError, match="branches.kxk.bn: 1 of 4 running variances are negative"):
        fuse(block)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fuse takes a torch.nn.Module, got int; of a YOLO\(...\) give its .model"):
        fuse(3)  # type: ignore[arg-type]

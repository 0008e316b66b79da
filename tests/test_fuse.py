"""Every block, folded, computes the same in float64, borders included, with random BN statistics."""

import pytest
import torch
from torch import nn

from rep_backbones import blocks, equivalent_conv, fuse, verify
from rep_backbones.affine import AffineConv, AlgebraError
from rep_backbones.rules import FoldError, multi_branch

CASES = [
    (6, lambda: blocks.RepConv(6, 6)),
    (6, lambda: blocks.RepConvN(6, 6)),
    (3, lambda: blocks.RepVGGBlock(3, 8, s=2, se=True)),
    (8, lambda: blocks.RepVGGBlock(8, 8, g=4, d=2)),
    (8, lambda: blocks.RepConv(8, 8, k=(1, 5))),
    (6, lambda: blocks.BottleRep(6, 6)),
    (8, lambda: blocks.BepC3(8, 16, 6)),
    (8, lambda: blocks.SimSPPF(8, 8)),
    (8, lambda: blocks.SimCSPSPPF(8, 8)),
]


def randomized(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.1, 3)
    return model.double().eval()


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_fused_block_computes_the_same(case):
    channels, build = CASES[case]
    model = randomized(build())
    fused = fuse(model)
    assert not multi_branch(fused)
    report = verify(model, fused, [torch.randn(2, channels, n, 11).double() for n in (8, 13)])
    assert report.ok, report


def test_a_repconv_is_one_convolution():
    fused = fuse(randomized(blocks.RepConv(6, 6)))
    assert type(fused) is nn.Sequential and [type(m) for m in fused] == [nn.Conv2d, nn.SiLU]


def test_the_equivalent_kernel_keeps_dilation_and_groups():
    value = equivalent_conv(randomized(blocks.RepVGGBlock(8, 8, g=4, d=2)))
    assert (value.kernel_size, value.dilation, value.padding, value.groups) == ((3, 3), (2, 2), (2, 2), 4)


def test_train_mode_and_nan_are_refused():
    with pytest.raises(FoldError, match="train mode"):
        fuse(blocks.RepConv(4, 4))
    model = blocks.RepConv(4, 4).eval()
    nn.init.constant_(model.get_submodule("branches.kxk.bn").running_var, float("nan"))
    with pytest.raises(FoldError, match="branches.kxk.bn.running_var.*NaN or inf"):
        fuse(model)


def test_padding_between_two_convolutions_is_refused():
    first = AffineConv.from_conv(nn.Conv2d(3, 4, 1))
    with pytest.raises(AlgebraError, match="not a convolution at the border"):
        first.then(AffineConv.from_conv(nn.Conv2d(4, 5, 3, padding=1)))

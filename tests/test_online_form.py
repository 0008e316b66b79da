"""The online form: any block as one convolution whose kernel is folded in each forward, equal to the explicit sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from yolo_helpers import randomize_norms

from rep_backbones import blocks, equivalent_conv, expand, fuse
from rep_backbones.candidates import ExpandError
from rep_backbones.containers import Block, Parallel, Scale
from rep_backbones.expand import Expanded, collapse
from rep_backbones.gradient_form import masked
from rep_backbones.online import Online
from rep_backbones.online_form import NORMS, is_online, to_online
from rep_backbones.registry import LAYERS
from rep_backbones.rules import FoldError, multi_branch

WITH_BRANCHES = sorted(name for name in LAYERS if multi_branch(LAYERS[name].cls(4, 4)))
WITHOUT = sorted(set(LAYERS) - set(WITH_BRANCHES))


def made(name: str) -> nn.Module:
    """A layer in float64 and train mode whose norms and zeros have random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = randomize_norms(LAYERS[name].cls(4, 4))
        for parameter in layer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter)
        return layer.double()


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Explicit(nn.Module):
    """A layer in the online form whose branches are really run and summed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        for path, module in [*self.layer.named_modules()]:
            if isinstance(module, Online):
                self.layer.set_submodule(path, module.branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_it_computes_the_same_in_eval_mode_and_fuses(name: str) -> None:
    layer, x = made(name).eval(), pictures()
    online = to_online(layer)
    torch.testing.assert_close(online(x), layer(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fuse(online)(x), layer(x), rtol=1e-11, atol=1e-11)
    parts = [part for _, _, part in multi_branch(online)]
    assert len(parts) == len(multi_branch(layer)) and all(map(is_online, parts))
    for part in parts:
        assert sum(type(module) in NORMS for module in part.modules()) == 1
    assert not any(isinstance(module, Online) for module in layer.modules()) or name == "OREPABlock", "a copy"


@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_outputs_and_gradients_are_those_of_the_explicit_sum_in_train_mode(name: str) -> None:
    online = to_online(made(name)).train()
    explicit = Explicit(online).train()
    x, y = pictures().requires_grad_(), pictures().requires_grad_()
    ours, theirs = online(x), explicit(y)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for (path, mine), (_, other) in zip(online.named_parameters(), explicit.layer.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-10, msg=path)
        assert mine.grad is not None and mine.grad.any(), f"{path} learns nothing"


@pytest.mark.parametrize("name", WITHOUT)
def test_a_layer_without_branches_is_refused(name: str) -> None:
    with pytest.raises(FoldError, match=f"{name} has no branches that fold to one convolution"):
        to_online(LAYERS[name].cls(4, 4))


def test_scales_of_fresh_norms_are_one_and_trained_ones_are_folded() -> None:
    online = to_online(blocks.RepVGGBlock(4, 4))
    for scale in (m for m in online.modules() if isinstance(m, Scale)):
        torch.testing.assert_close(scale.alpha, torch.ones(4), rtol=1e-4, atol=0)
    block = made("RepVGGBlock")
    norm: nn.BatchNorm2d = block.get_submodule("branches.kxk.bn")  # type: ignore[assignment]
    assert norm.running_var is not None
    expected = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(to_online(block).get_parameter("branches.sum.branches.kxk.bn.alpha"), expected)


def test_a_branch_with_an_activation_is_refused_with_its_path() -> None:
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4))
    model = nn.Sequential(Block(Parallel({"a": branch, "b": nn.BatchNorm2d(4)}), act=nn.ReLU()))
    before = [*model.modules()]
    with pytest.raises(FoldError, match=r"^0\.branches\.a\.1: torch\.nn\.modules\.activation\.ReLU has no rule"):
        to_online(model, inplace=True)
    assert [*model.modules()] == before


def test_other_layers_of_a_model_stay_and_sums_alone_are_taken() -> None:
    def normed(k: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2, bias=False), nn.BatchNorm2d(4))

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Parallel({"a": normed(3), "b": normed(1)}), nn.ReLU())
    model = randomize_norms(model).double().eval()
    online = to_online(model)
    torch.testing.assert_close(online(pictures()), model(pictures()), rtol=1e-12, atol=1e-12)
    assert type(online[1]) is nn.BatchNorm2d and is_online(online[2])  # type: ignore[index]
    alone = to_online(model[2])
    assert is_online(alone)


def test_a_sum_without_norms_gets_none() -> None:
    model = nn.Sequential(Parallel({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}), nn.BatchNorm2d(4))
    online = to_online(model.double().eval())
    assert type(online[0]) is Online  # type: ignore[index]
    torch.testing.assert_close(online(pictures()), model(pictures()))


def test_norms_that_are_synchronized_stay_so() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(blocks.RepVGGBlock(4, 4))
    assert isinstance(to_online(block).get_submodule("branches.bn"), nn.SyncBatchNorm)


def test_a_training_in_mixed_precision_folds_in_full() -> None:
    online = to_online(blocks.DiverseBranchBlock(4, 4)).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = online(pictures().float())
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in online.parameters())


def test_the_fold_of_nan_is_refused() -> None:
    block = blocks.RepVGGBlock(4, 4)
    nn.init.constant_(block.get_submodule("branches.1x1.conv").weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(FoldError, match="NaN"):
        to_online(block)


# ---- expand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "gradient"])
@pytest.mark.parametrize("block", ["RepVGGBlock", "MobileOneBlock"])
def test_an_expanded_network_computes_the_same_in_both_modes(block: str, mode: str) -> None:
    torch.manual_seed(0)
    model = randomize_norms(resnet18(num_classes=3)).double()
    grown = expand(model, block, layers=["layer1", "layer4.0"], kernels=3, mode=mode)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    for training in (False, True, False):  # the last with the statistics of the one before
        torch.testing.assert_close(grown.train(training)(x), model.train(training)(x), rtol=1e-12, atol=1e-12)
    if mode == "online":
        assert sum(isinstance(module, Online) for module in grown.modules()) == 6
        grown(x).square().mean().backward()
        assert all(p.grad is not None for m in grown.modules() if isinstance(m, Scale) for p in m.parameters())
    else:
        assert len(list(masked(grown))) == 6 and not multi_branch(grown)
    plain = fuse(grown.eval())
    assert not multi_branch(plain) and not list(masked(plain))
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_every_block_that_can_be_expanded_can_be_online() -> None:
    """DBB with its inner norms too, and OREPA, which is."""
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    x = pictures()
    for name in ("DiverseBranchBlock", "ACBlock", "OREPABlock", "RepConv", "DilatedReparamBlock", "QARepVGGBlock"):
        try:
            grown = expand(conv, name, mode="online")
        except ExpandError as error:
            assert name == "QARepVGGBlock" and "can't start at zero" in str(error)
            continue
        torch.testing.assert_close(grown.train()(x), conv.train()(x), rtol=1e-12, atol=1e-12)
        layer = next(m for m in grown.modules() if isinstance(m, Expanded))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in layer.modules()) == 1
        assert equivalent_conv(grown.eval()[0]).kernel_size == (3, 3)  # type: ignore[index]
        assert [type(m) for m in collapse(grown).modules()] == [type(m) for m in conv.modules()]


def test_modes_that_expand_refuses() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    with pytest.raises(ExpandError, match="mode='onlin' is unknown; accepted are branches, online, gradient"):
        expand(conv, "RepVGGBlock", mode="onlin")
    with pytest.raises(ExpandError, match="DiverseBranchBlock has no gradient form.*1x1_kxk"):
        expand(conv, "DiverseBranchBlock", mode="gradient")
    grown = expand(conv, "RepVGGBlock", mode="gradient")
    with pytest.raises(ExpandError, match="0 is in the gradient form already"):
        expand(grown, "RepVGGBlock")

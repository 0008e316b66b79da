"""Weight decay: none on norms and scales; on kernels that of the equivalent kernel, as a gradient in each optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from yolo_helpers import randomize_norms

from rep_backbones import decay
from rep_backbones.blocks import (
    DiverseBranchBlock,
    MobileOneBlock,
    OREPABlock,
    QARepVGGBlock,
    RepVGGBlock,
    WeightedResidualBlock,
)
from rep_backbones.containers import Block, Parallel, Scale
from rep_backbones.rules import FoldError, equivalent_conv, multi_branch

DECAY = 0.05
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": lambda: RepVGGBlock(4, 4),
    "RepVGG, groups and stride": lambda: RepVGGBlock(4, 8, s=2, g=2),
    "DBB": lambda: DiverseBranchBlock(4, 6),
    "MobileOne": lambda: MobileOneBlock(4, 4, n=2),
    "QARepVGG": lambda: QARepVGGBlock(4, 4),
    "OREPA": lambda: OREPABlock(4, 4),
    "weighted residual": lambda: WeightedResidualBlock(4, 4, n=1),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """A block in float64 and in train mode, its norms with statistics of some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = randomize_norms(BLOCKS[name](), seed)
        for parameter in block.parameters():
            if not parameter.any():  # what starts at zero has no pull, or hides that of what it is multiplied with
                nn.init.normal_(parameter)
        return block.double().train()


def kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def stepped(model: nn.Module, equivalent: bool, lr: float = 1.0, weight_decay: float = DECAY) -> nn.Module:
    """A copy of the model after one step of plain gradient descent on gradients of zero."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    decay.spare(optimizer, model)
    if equivalent:
        decay.decay_equivalent(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_goes_down_half_the_square_of_the_deployed_kernel(name: str) -> None:
    """Against finite differences of what `equivalent_conv` deploys: at each kernel's first, last and some middle numbers."""
    block = made(name)
    after = stepped(block, equivalent=True)

    def half_square(parameter: str, index: int, by: float) -> float:
        moved = copy.deepcopy(block)
        with torch.no_grad():
            moved.get_parameter(parameter).view(-1)[index] += by
        return float(equivalent_conv(multi_branch(moved.eval())[0][1]).weight.square().sum()) / 2

    eps = 1e-5
    largest = 0.0
    for parameter, kernel in kernels(block).items():
        for index in {0, kernel.numel() // 2, kernel.numel() // 3, kernel.numel() - 1}:
            slope = (half_square(parameter, index, eps) - half_square(parameter, index, -eps)) / (2 * eps)
            moved = float((after.get_parameter(parameter) - kernel).detach().view(-1)[index])
            assert moved == pytest.approx(-DECAY * slope, rel=1e-6, abs=1e-9), (parameter, index)
            largest = max(largest, abs(moved))
    assert largest > 1e-3


def test_the_formula_of_repvgg_by_hand() -> None:
    """W = t3 K3 + (t1 K1 + t0 I at the centre), each t the gamma / sqrt(var + eps) of a norm; pull on K3 is t3 W."""
    block = made("RepVGG")
    kxk, point, identity = (block.branches.get_submodule(name) for name in ("kxk", "1x1", "identity"))
    scale = {norm: (norm.weight / (norm.running_var + norm.eps).sqrt()) for norm in (kxk.bn, point.bn, identity)}
    weight = kxk.conv.weight * scale[kxk.bn].reshape(-1, 1, 1, 1)
    centre = point.conv.weight[:, :, 0, 0] * scale[point.bn].reshape(-1, 1) + torch.diag(scale[identity])
    weight = weight + nn.functional.pad(centre[:, :, None, None], (1, 1, 1, 1))
    after = stepped(block, equivalent=True).branches
    expected = kxk.conv.weight - DECAY * scale[kxk.bn].reshape(-1, 1, 1, 1) * weight
    torch.testing.assert_close(after.get_submodule("kxk").conv.weight, expected, rtol=1e-12, atol=1e-14)
    expected = point.conv.weight - DECAY * scale[point.bn].reshape(-1, 1, 1, 1) * weight[:, :, 1:2, 1:2]
    torch.testing.assert_close(after.get_submodule("1x1").conv.weight, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("equivalent", [False, True], ids=["plain", "equivalent"])
def test_norms_and_scales_do_not_decay(name: str, equivalent: bool) -> None:
    block = made(name)
    after = stepped(block, equivalent)
    spared = {id(p) for m in after.modules() if isinstance(m, (nn.BatchNorm2d, Scale)) for p in m.parameters(recurse=False)}
    assert spared
    for parameter, value in after.named_parameters():
        same = torch.equal(value, block.get_parameter(parameter))
        assert same == (id(value) in spared), parameter


def test_plain_decay_is_that_of_pytorch_on_the_kernels() -> None:
    block = made("DBB")
    after = stepped(block, equivalent=False)
    for name, kernel in kernels(block).items():
        torch.testing.assert_close(after.get_parameter(name), kernel * (1 - DECAY))


def test_what_has_no_branches_keeps_its_own_decay() -> None:
    model = nn.Sequential(made("RepVGG"), nn.Conv2d(4, 4, 3, dtype=torch.float64))
    after = stepped(model, equivalent=True)
    torch.testing.assert_close(after[1].weight, model[1].weight * (1 - DECAY))


def test_it_follows_the_weight_decay_of_the_group_that_the_kernels_came_from() -> None:
    """A schedule changes it there; an optimizer that loads its state gets new groups."""
    model = made("RepVGG")
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD([{"params": first.parameters()}], lr=1.0, weight_decay=DECAY)
    decay.decay_equivalent(optimizer, first)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    optimizer.param_groups[0]["weight_decay"] = 0.5 * DECAY
    for parameter in first.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    second = stepped(second, equivalent=True, weight_decay=0.5 * DECAY)
    for name in kernels(model):
        torch.testing.assert_close(first.get_parameter(name), second.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), model.get_parameter(name))


def test_frozen_kernels_and_kernels_without_a_gradient_stay() -> None:
    block = made("RepVGG")
    frozen, without = block.branches.get_submodule("kxk").conv.weight, block.branches.get_submodule("1x1").conv.weight
    frozen.requires_grad_(False)
    before = [frozen.clone(), without.clone()]
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0, weight_decay=DECAY)
    decay.decay_equivalent(optimizer, block)
    optimizer.step()
    assert torch.equal(frozen, before[0]) and torch.equal(without, before[1])
    without.grad = torch.zeros_like(without)
    optimizer.step()
    assert torch.equal(frozen, before[0]) and not torch.equal(without, before[1])


def test_a_kernel_in_two_layers_is_pulled_by_both() -> None:
    one = made("RepVGG")
    both = nn.Sequential(one, Block(Parallel({"a": one.branches.get_submodule("kxk"), "b": nn.BatchNorm2d(4).double()})))
    pulls = []
    for model in (one, both[1], both):
        pulls.append(stepped(model, equivalent=True))
    kernel = one.branches.get_submodule("kxk").conv.weight
    alone = pulls[0].branches.get_submodule("kxk").conv.weight - kernel
    second = pulls[1].branches.get_submodule("a").conv.weight - kernel
    together = pulls[2][0].branches.get_submodule("kxk").conv.weight - kernel
    torch.testing.assert_close(together, alone + second)


def test_gradient_scaling_and_accumulation_do_not_change_it() -> None:
    """The step of loss scale 1024 and two backwards is that of the same gradients without either."""
    block = made("RepVGG")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def trained(scale: float) -> nn.Module:
        model = copy.deepcopy(block).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=DECAY)
        decay.decay_equivalent(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", enabled=scale > 1, init_scale=scale)
        for _ in range(2):
            for part in x:
                scaler.scale(model(part[None]).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    plain, scaled = trained(1.0), trained(1024.0)
    for name in kernels(block):
        torch.testing.assert_close(plain.get_parameter(name), scaled.get_parameter(name), rtol=1e-9, atol=1e-11)


def test_the_deployed_kernel_shrinks_and_the_identity_is_part_of_it() -> None:
    """Without any loss the branches end where they cancel the identity; plain decay ends at the identity itself."""
    norms: dict[bool, float] = {}
    for equivalent in (False, True):
        block = made("RepVGG")
        optimizer = torch.optim.SGD(block.parameters(), lr=1.0, weight_decay=0.2)
        decay.spare(optimizer, block)
        if equivalent:
            decay.decay_equivalent(optimizer, block)
        for _ in range(200):
            for parameter in block.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        norms[equivalent] = float(equivalent_conv(block.eval()).weight.norm())
    identity = made("RepVGG").branches.get_submodule("identity")
    alone = float((identity.weight / (identity.running_var + identity.eps).sqrt()).detach().norm())
    assert norms[False] == pytest.approx(alone, rel=1e-6)
    assert norms[True] < 0.01 * alone


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_that_decay_otherwise_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = made("RepVGG")
    with pytest.raises(
        TypeError, match=f"{kind.__name__} does not take decay=equivalent.*optimizer=SGD or Adam or"
    ) as caught:
        decay.decay_equivalent(kind(model.parameters(), weight_decay=0.1), model)
    assert "decay=plain" in str(caught.value)


@pytest.mark.parametrize("kind", decay.OPTIMIZERS)
def test_every_optimizer_that_is_accepted_takes_the_pull_as_a_gradient(kind: type[torch.optim.Optimizer]) -> None:
    """The step with it is the step without weight decay on gradients that have the pull in them."""
    model = made("RepVGG")
    by_hook, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.01}
    hooked = kind(by_hook.parameters(), weight_decay=DECAY, **options)
    decay.spare(hooked, by_hook)
    decay.decay_equivalent(hooked, by_hook)
    bare = kind(by_hand.parameters(), weight_decay=0.0, **options)
    (DECAY * decay.half_square(by_hand.branches)).backward()
    for module in by_hand.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.grad = None
    for parameter in by_hook.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hooked.step()
    bare.step()
    for name, kernel in kernels(model).items():
        torch.testing.assert_close(by_hook.get_parameter(name), by_hand.get_parameter(name), rtol=1e-9, atol=1e-12)
        assert not torch.equal(by_hook.get_parameter(name), kernel)


class Swish(nn.Module):
    """Not affine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sigmoid()


def test_a_layer_without_an_equivalent_kernel_is_refused_with_its_path() -> None:
    bad = Block(Parallel({"a": nn.Sequential(nn.Conv2d(4, 4, 1), Swish()), "b": nn.BatchNorm2d(4)}))
    model = nn.Sequential(made("RepVGG"), bad)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=DECAY)
    with pytest.raises(FoldError, match=r"^1: has no equivalent kernel.*a\.1.*Swish"):
        decay.decay_equivalent(optimizer, model)
    assert len(optimizer.param_groups) == 1, "refused before anything is moved"


def test_parameters_that_did_not_decay_stay_where_they_are() -> None:
    model = made("weighted residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.0)
    decay.spare(optimizer, model)
    decay.decay_equivalent(optimizer, model)
    assert len(optimizer.param_groups) == 1


def test_a_kernel_far_from_finite_is_not_hidden() -> None:
    block = made("RepVGG")
    with torch.no_grad():
        block.branches.get_submodule("kxk").conv.weight.fill_(math.inf)
    after = stepped(block, equivalent=True)
    assert not torch.isfinite(after.branches.get_submodule("1x1").conv.weight).all()

"""The gradient form: a plain network whose steps are those of constant-scale branches, over several steps in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from yolo_helpers import randomize_norms

from rep_backbones import blocks, fuse
from rep_backbones.containers import Block, Parallel, Scale
from rep_backbones.gradient_form import SIZES, SQUARES, mask, masked, masks_of, to_gradient, unmask
from rep_backbones.online_form import to_online
from rep_backbones.registry import LAYERS
from rep_backbones.rep_optimizers import RepAdamW, RepSGD
from rep_backbones.rules import FoldError, equivalent, multi_branch

MADE: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": lambda: blocks.RepVGGBlock(4, 4),
    "RepVGG, stride and groups": lambda: blocks.RepVGGBlock(4, 8, s=2, g=2),
    "ACNet": lambda: blocks.ACBlock(4, 6),
    "MobileOne": lambda: blocks.MobileOneBlock(4, 4, n=2),
    "QARepVGG": lambda: blocks.QARepVGGBlockV2(4, 4),
    "depthwise": lambda: blocks.RepVGGDW(4, 4),
    "dilated": lambda: blocks.DilatedReparamBlock(4, 4),
}
NONE = ("DiverseBranchBlock", "OREPABlock")  # kernels in series, and pooling behind one


def made(name: str, seed: int = 0) -> nn.Module:
    """A block in float64, its norms, and so its scales, of some training; one scale is negative at least."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_norms(MADE[name](), seed).double()


def pictures(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, 7, 6, dtype=torch.float64, generator=generator) for _ in range(n)]


class ConstantScales(nn.Module):
    """The explicit form by hand: branches that are really summed, constant scales behind kernels, one norm, activation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        online = to_online(block)
        (_, _, part), *_ = multi_branch(online)
        self.branches, self.bn, self.act = part.get_submodule("sum.branches"), part.get_submodule("bn"), online[-1]  # type: ignore[index]
        for _, branch in self.branches.named_children():
            if any(isinstance(m, nn.Conv2d) for m in branch.modules()):
                for scale in (m for m in branch.modules() if isinstance(m, Scale)):
                    scale.alpha.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.branches(x)))

    @property
    def kernel(self) -> Tensor:
        return equivalent(self.branches).weight


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    """The losses of some steps of the model in train mode."""
    losses = []
    model.train()
    for x in pictures(steps):
        optimizer.zero_grad()
        y = model(x)
        target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().mul(9).reshape(y.shape)
        loss = (y - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.2},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
}


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
@pytest.mark.parametrize("name", MADE)
def test_rep_sgd_is_sgd_on_constant_scale_branches(name: str, options: dict[str, Any]) -> None:
    block = made(name)
    explicit, plain = ConstantScales(block), to_gradient(block)
    losses = trained(explicit, torch.optim.SGD(explicit.parameters(), lr=0.1, **options))
    ours = trained(plain, RepSGD(plain.parameters(), model=plain, lr=0.1, **options))
    assert ours == pytest.approx(losses, rel=1e-11)
    assert losses[-1] < losses[0]
    ((_, conv, _),) = masked(plain)
    torch.testing.assert_close(conv.weight, explicit.kernel, rtol=1e-10, atol=1e-12)
    without = to_gradient(block)
    trained(without, torch.optim.SGD(without.parameters(), lr=0.1, **options))
    assert not torch.allclose(next(masked(without))[1].weight, conv.weight, atol=1e-3)


@pytest.mark.parametrize("name", MADE)
def test_rep_adamw_is_adamw_on_constant_scale_branches_but_for_eps(name: str) -> None:
    block, options = made(name), {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-20}
    explicit, plain = ConstantScales(block), to_gradient(block)
    losses = trained(explicit, torch.optim.AdamW(explicit.parameters(), **options))
    ours = trained(plain, RepAdamW(plain.parameters(), model=plain, **options))
    assert ours == pytest.approx(losses, rel=1e-9)
    ((_, conv, _),) = masked(plain)
    torch.testing.assert_close(conv.weight, explicit.kernel, rtol=1e-8, atol=1e-10)
    without = to_gradient(block)
    trained(without, torch.optim.AdamW(without.parameters(), **options))
    assert not torch.allclose(next(masked(without))[1].weight, conv.weight, atol=1e-3)


def test_the_eps_of_rep_adamw_is_of_the_whole_kernel() -> None:
    """What is not equal: a branch of scale s has eps / |s|. With scales of 1 it is equal with any eps."""
    block = blocks.RepVGGBlock(4, 4).double()
    for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eps = 1e-14
    for eps, scale, same in ((0.5, 1.0, True), (0.5, 0.2, False)):
        for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.constant_(bn.weight, scale)
        explicit, plain = ConstantScales(block), to_gradient(block)
        losses = trained(explicit, torch.optim.AdamW(explicit.parameters(), lr=0.01, eps=eps))
        ours = trained(plain, RepAdamW(plain.parameters(), model=plain, lr=0.01, eps=eps))
        assert (ours == pytest.approx(losses, rel=1e-9)) == same


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_upwards_decays_downwards_too(cls: Any) -> None:
    block, options = made("QARepVGG"), {"lr": 0.01, "weight_decay": 0.5, "maximize": True}
    ours = {torch.optim.SGD: RepSGD, torch.optim.AdamW: RepAdamW}[cls]
    explicit, plain = ConstantScales(block), to_gradient(block)
    trained(explicit, cls(explicit.parameters(), **options), steps=3)
    trained(plain, ours(plain.parameters(), model=plain, **options), steps=3)
    torch.testing.assert_close(next(masked(plain))[1].weight, explicit.kernel, rtol=1e-6, atol=1e-6)


def test_the_masks_of_repvgg_by_hand() -> None:
    """Two channels, scales 2 and 3 behind the 3x3, 0.5 and -1 behind the 1x1; the identity's own scale is learned."""
    online = to_online(blocks.RepVGGBlock(2, 2))
    branches = online.get_submodule("branches.sum.branches")
    with torch.no_grad():
        branches.get_submodule("kxk")[1].alpha.copy_(torch.tensor([2.0, 3.0]))  # type: ignore[index]
        branches.get_submodule("1x1")[1].alpha.copy_(torch.tensor([0.5, -1.0]))  # type: ignore[index]
    masks = masks_of(branches)
    squares, sizes = torch.empty(2, 2, 3, 3).double(), torch.empty(2, 2, 3, 3).double()
    squares[0], squares[1], sizes[0], sizes[1] = 4.0, 9.0, 2.0, 3.0
    squares[:, :, 1, 1] = torch.tensor([[5.25, 4.25], [10.0, 11.0]])
    sizes[:, :, 1, 1] = torch.tensor([[3.5, 2.5], [4.0, 5.0]])
    torch.testing.assert_close(masks.squares, squares)
    torch.testing.assert_close(masks.sizes, sizes)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_form_or_says_why_not(name: str) -> None:
    layer = randomize_norms(LAYERS[name].cls(4, 4)).double().eval()
    if not multi_branch(layer):
        with pytest.raises(FoldError, match=f"{type(layer).__name__} has no branches"):
            to_gradient(layer)
        return
    if name in NONE:
        with pytest.raises(FoldError, match="no gradient form.*1x1_kxk.*train it online"):
            to_gradient(layer)
        return
    plain = to_gradient(layer)
    x = pictures(1)[0]
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-12, atol=1e-12)
    assert not multi_branch(plain)
    assert len(list(masked(plain))) == len(multi_branch(layer))
    torch.testing.assert_close(fuse(plain)(x), layer(x), rtol=1e-12, atol=1e-12)
    assert not list(masked(fuse(plain)))


def test_scales_of_a_search_become_the_constants() -> None:
    search, model = to_online(made("RepVGG", 1)), made("RepVGG", 0)
    plain = to_gradient(model, scales=search)
    wanted = to_online(model)
    for mine, theirs in zip(wanted.modules(), search.modules()):
        if isinstance(mine, Scale):
            mine.alpha.data.copy_(theirs.alpha)  # type: ignore[union-attr, arg-type]
    (_, conv, masks), (_, other, expected) = next(masked(plain)), next(masked(to_gradient(wanted)))
    assert torch.equal(masks.squares, expected.squares) and torch.equal(conv.weight, other.weight)
    assert not torch.equal(masks.squares, next(masked(to_gradient(model)))[2].squares)


def test_scales_of_other_layers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"branches.sum.branches.kxk.bn is a scale of 4 here, and none there.*branches=online"
    ):
        to_gradient(made("RepVGG"), scales=made("RepVGG"))
    with pytest.raises(ValueError, match="a scale of 4 here, and a Scale of 8|is a scale of 4 here, and a Scale"):
        to_gradient(made("RepVGG"), scales=to_online(made("RepVGG, stride and groups")))


def test_what_has_no_masks_takes_the_stock_step() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(to_gradient(made("RepVGG")), nn.Conv2d(4, 4, 3).double())
    other = copy.deepcopy(plain)
    trained(plain, RepSGD(plain.parameters(), model=plain, lr=0.1), steps=1)
    trained(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
    assert torch.equal(plain[1].weight, other[1].weight)
    assert not torch.equal(next(masked(plain))[1].weight, next(masked(other))[1].weight)


@pytest.mark.parametrize("cls", [RepSGD, RepAdamW])
def test_a_step_leaves_gradients_and_what_has_none(cls: Any) -> None:
    plain = nn.ModuleList([to_gradient(made("RepVGG")), to_gradient(made("RepVGG", 1))])
    optimizer = cls(plain.parameters(), model=plain, lr=0.1, weight_decay=0.1)
    plain[0](pictures(1)[0]).square().mean().backward()
    before, kept = next(masked(plain))[1].weight.grad.clone(), next(masked(plain[1]))[1].weight.detach().clone()  # type: ignore[union-attr]
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(next(masked(plain))[1].weight.grad, before)  # type: ignore[arg-type]
    assert torch.equal(next(masked(plain[1]))[1].weight, kept)


@pytest.mark.parametrize("cls", [RepSGD, RepAdamW])
def test_an_optimizer_without_masks_is_refused(cls: Any) -> None:
    model = made("RepVGG")
    with pytest.raises(ValueError, match=f"{cls.__name__}: the model has no layer in the gradient form.*to_gradient"):
        cls(model.parameters(), model=model)
    plain = to_gradient(model)
    if cls is RepAdamW:
        with pytest.raises(ValueError, match="fused=True"):
            cls(plain.parameters(), model=plain, fused=True)


def test_the_masks_move_with_the_model_and_come_off() -> None:
    plain = to_gradient(made("RepVGG"))
    assert {f"branches.sum.{name}" for name in (SQUARES, SIZES)} <= plain.state_dict().keys()
    optimizer = RepSGD(plain.parameters(), model=plain, lr=0.1)
    plain.float()
    optimizer.zero_grad()
    plain(pictures(1)[0].float()).mean().backward()
    optimizer.step()
    assert next(masked(copy.deepcopy(plain)))[2].squares.dtype == torch.float32
    unmask(plain)
    assert not list(masked(plain)) and not [name for name in plain.state_dict() if "gradient" in name]


def test_a_bias_in_front_of_the_norm_is_the_norms() -> None:
    torch.manual_seed(0)
    branches = {str(k): nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), nn.BatchNorm2d(4)) for k in (3, 1)}
    block = randomize_norms(Block(Parallel(branches), act=nn.ReLU())).double().eval()
    plain, x = to_gradient(block), pictures(1)[0]
    assert next(masked(plain))[1].bias is None
    torch.testing.assert_close(plain(x), block(x), rtol=1e-12, atol=1e-12)


def test_a_sum_without_a_norm_has_no_gradient_form() -> None:
    model = nn.Sequential(Parallel({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}), nn.ReLU())
    with pytest.raises(FoldError, match=r"^0: has no gradient form: no norm"):
        to_gradient(model)


def test_shapes_alone_have_masks() -> None:
    with torch.device("meta"):
        plain = to_gradient(blocks.RepVGGBlock(4, 4))
    assert next(masked(plain))[2].squares.shape == (4, 4, 3, 3)


def test_masks_can_be_put_on_by_hand() -> None:
    conv = nn.Conv2d(4, 4, 3, bias=False)
    mask(conv, masks_of(to_online(blocks.RepVGGBlock(4, 4)).get_submodule("branches.sum.branches")))
    assert [path for path, _, _ in masked(nn.Sequential(conv))] == ["0"]

"""expand(): each block that applies keeps the function of plain layers, in eval and train mode, learns, and folds back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from rep_backbones import expand, fuse, verify
from rep_backbones.blocks.frame import Frame
from rep_backbones.candidates import ExpandError
from rep_backbones.containers import Block, Parallel
from rep_backbones.expand import Expanded, collapse
from rep_backbones.registry import LAYERS
from rep_backbones.rules import multi_branch

NAMES = sorted(name for name, layer in LAYERS.items() if layer.cls.__module__.startswith("rep_backbones."))
APPLY = {"ACBlock", "DilatedReparamBlock", "DiverseBranchBlock", "MobileOneBlock", "OREPABlock", "RepConv", "RepConvN"}
APPLY |= {"RepVGGBlock", "RepVGGDW", "ReparamLargeKernelConv"}


class Unordered(nn.Module):
    """Registers its layers in another order than it runs them in; the last convolution has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2)
        self.norm_of_second = nn.BatchNorm2d(6, eps=1e-3, momentum=0.03)
        self.norm_of_first = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_of_first(self.first(x)).relu()
        return self.last(self.norm_of_second(self.second(x)).relu())


def conv_bn(c1: int, c2: int, k: tuple[int, int], **rest: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, k, padding=(k[0] // 2, k[1] // 2), **rest), nn.BatchNorm2d(c2), nn.SiLU())


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = ((3, 3), (5, 5), (1, 9), (9, 1), (7, 7), (1, 5), (5, 1))
    deep = nn.Sequential(*(conv_bn(6, 6, k) for k in sizes))
    model = nn.Sequential(conv_bn(3, 4, (3, 3)), Unordered(), nn.Conv2d(5, 6, 1), deep, conv_bn(6, 6, (3, 3), groups=6))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.1, 2)
    return model.double().eval()


def picture() -> torch.Tensor:
    return torch.randn(3, 3, 19, 22, generator=torch.Generator().manual_seed(1)).double()


def applied(name: str) -> nn.Module:
    try:
        return expand(network(), name)
    except ExpandError as error:
        assert name not in APPLY, error
        pytest.skip(str(error))


def test_the_sweep_is_not_empty() -> None:
    assert APPLY <= set(NAMES)
    counts = {name: len(multi_branch(applied(name))) for name in APPLY}
    assert counts == dict.fromkeys(APPLY, 11) | {"DilatedReparamBlock": 10}, "which takes no dilated convolution"


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_kept_in_eval_and_in_train_mode(name: str) -> None:
    plain, model = network(), applied(name)
    assert verify(plain, model, [picture()], tolerance=1e-12)
    a, b = copy.deepcopy(plain).train(), copy.deepcopy(model).train()
    torch.testing.assert_close(b(picture()), a(picture()), rtol=0, atol=1e-12)
    for module in (a, b):
        module.eval()
    assert verify(a, b, [picture()], tolerance=1e-12), "the running statistics went on alike"


@pytest.mark.parametrize("name", NAMES)
def test_fusing_gives_the_plain_network_back(name: str) -> None:
    plain, model = network(), applied(name)
    fused = fuse(model)
    assert verify(plain, fused, [picture()], tolerance=1e-11)
    assert not multi_branch(fused) and not any(isinstance(m, Expanded) for m in fused.modules())
    shapes = [(m.weight.shape, m.stride, m.padding, m.dilation, m.groups) for m in plain.modules() if type(m) is nn.Conv2d]
    assert [
        (m.weight.shape, m.stride, m.padding, m.dilation, m.groups) for m in fused.modules() if type(m) is nn.Conv2d
    ] == (shapes)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    model = applied(name).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    target = torch.randn(3, 6, 10, 11, generator=torch.Generator().manual_seed(2)).double()
    for _ in range(3):
        optimizer.zero_grad()
        (model(picture()) - target).square().mean().backward()
        optimizer.step()
    still = [path for path, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    assert verify(model.eval(), fuse(model), [picture()], tolerance=1e-10), "trained, it still folds"


@pytest.mark.parametrize("name", sorted(APPLY))
def test_networks_without_norms_are_calibrated(name: str) -> None:
    plain = fuse(network())
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = expand(plain, name, batches=[picture(), picture() * 2])
    assert len(multi_branch(model)) == 12 - (name == "DilatedReparamBlock")
    assert verify(plain, model, [picture()], tolerance=1e-9) and verify(plain, fuse(model), [picture()], tolerance=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    added = [m for m in model.modules() if isinstance(m, Expanded) and not m.norm_here]
    norms = [m for layer in added for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(added) == 10 and all(m.momentum == 0.1 and m.num_batches_tracked == 2 for m in norms), (
        "measured on both batches"
    )
    assert name == "OREPABlock" or any(m.running_mean.abs().max() > 0.01 for m in norms)


def test_norms_are_found_by_the_forward() -> None:
    model = expand(network(), "RepConv")
    first = model[1].first
    assert first.get_submodule(first.norm_here).eps == 1e-5 and type(model[1].norm_of_first) is nn.Identity
    second = model[1].second
    assert {m.eps for m in second.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}, "new norms take the old one's eps"
    assert {m.momentum for m in second.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}
    assert type(model[1].last) is nn.Conv2d, "no norm behind it"


def test_collapse_puts_everything_back() -> None:
    plain = network()
    model = collapse(expand(plain, "OREPABlock"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [  # with ids that are the same in each process
        ({"layers": "0"}, ["0.0"]),
        ({"layers": "3.*.0", "kernels": [(1, 9), (9, 1)]}, ["3.2.0", "3.3.0"]),
        ({"layers": ["1.first", "4"]}, ["1.first", "4.0"]),
        ({"layers": lambda path, conv: conv.stride == (2, 2)}, ["1.first"]),
        ({"kernels": 5}, ["3.1.0"]),
    ],
    ids=["a pattern", "a pattern and kernels", "names", "a predicate", "a kernel size"],
)
def test_layers_are_chosen(asked: dict, expected: list[str]) -> None:
    assert [path for path, _, _ in multi_branch(expand(network(), "RepConv", **asked))] == expected


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def one(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def hooked() -> nn.Module:
    model = one(nn.Conv2d(3, 3, 3, padding=1))
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "asked", "said"),
    [
        (network, {"block": "RepConf"}, "unknown layer 'RepConf': did you mean RepConv"),
        (network, {"layers": "neck.*"}, r"'neck.\*' matches no convolution. There are 0.0 \(3x3\)"),
        (network, {"layers": "1.last"}, "1.last: no batch normalization is seen to follow it directly.*give batches="),
        (network, {"kernels": 4}, "no convolution has kernels=4"),
        (network, {"block": "QARepVGGBlock"}, "normalizes its kxk branch and again behind the sum"),
        (network, {"block": "CSPStage"}, "it is a stage or a layer of its own"),
        (network, {"block": "RepVGGBlock", "se": True}, "more than a sum of branches"),
        (network, {"block": "MobileOneBlock", "m": 3}, "option 'm' of MobileOneBlock.*accepted are n, se"),
        (network, {"batches": []}, "batches is empty"),
        (lambda: fuse(network()[3]), {}, r"no norm follows any of them.*batches="),
        (shared, {}, "0 is the same module as 2"),
        (lambda: one(parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))), {}, "0 is parametrized"),
        (lambda: one(nn.Conv2d(3, 3, 2)), {}, "0: k=2: a 1x1 branch can't be aligned with an even kernel"),
        (lambda: one(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), {}, "0: padding_mode='reflect'"),
        (hooked, {}, "0 has forward hooks"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "There are none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_expanded_is_refused(model, asked: dict, said: str) -> None:
    asked = {"block": "RepConv"} | asked
    given = model()
    before = [(path, id(module)) for path, module in given.named_modules()]
    with pytest.raises(ExpandError, match=said):
        expand(given, asked.pop("block"), inplace=True, **asked)
    assert [(path, id(module)) for path, module in given.named_modules()] == before, "the model is untouched"


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_old_weight_norm_and_quantized_layers_are_refused() -> None:
    with pytest.warns(FutureWarning):
        old = one(nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1)))
    with pytest.raises(ExpandError, match="0 is weight-normed; remove that first"):
        expand(old, "RepConv")
    quantized = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    with pytest.raises(ExpandError, match="0 is quantized"):
        expand(quantized, "RepConv", layers="0")


def test_padding_that_does_not_keep_the_size() -> None:
    torch.manual_seed(0)
    for padding in (0, 1, 2, 4, (0, 3)):
        plain = one(nn.Conv2d(3, 4, 5, padding=padding)).double().eval()
        x = torch.randn(2, 3, 13, 12).double()
        for name in sorted(APPLY):
            model = expand(plain, name)
            with torch.no_grad():  # loud branches, so that a wrong place shows
                for p in model.parameters():
                    p.normal_()
            assert verify(model, fuse(model), [x], tolerance=1e-11), (name, padding)


class WithActivation(Block):
    """A wrong block: an activation inside a branch."""

    def __init__(self, c1, c2, k=3, s=1, p=None, g=1, d=1, act=True):
        frame = Frame.of(c1, c2, k, s, p, g, d)
        bent = nn.Sequential(*frame.branch(1).children(), nn.ReLU(), nn.BatchNorm2d(c2))
        super().__init__(Parallel({"kxk": frame.branch(), "bent": bent}), act=nn.Identity())


class WithoutStride(Block):
    """A wrong block: it ignores the stride."""

    def __init__(self, c1, c2, k=3, s=1, p=None, g=1, d=1, act=True):
        frame = Frame.of(c1, c2, k, 1, p, g, d)
        super().__init__(Parallel({"kxk": frame.branch(), "1x1": frame.branch(1)}), act=nn.Identity())


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (WithActivation, r"WithActivation does not fold to one convolution: bent.3: .*ReLU has no rule"),
        (WithoutStride, r"WithoutStride folds to a convolution of stride \(1, 1\), where this one has \(2, 2\)"),
    ],
)
def test_a_wrong_block_is_refused_before_it_is_trained(block: type[nn.Module], said: str) -> None:
    model = network()
    with pytest.raises(ExpandError, match=said):
        expand(model, block, layers="1.first")


def test_a_module_under_two_names_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.b, self.rest = self.a, one(nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(self.bn2(self.b(self.bn(self.a(x)))))

    with pytest.raises(ExpandError, match="a is the same module as b; each place needs a convolution of its own"):
        expand(Twice(), "RepConv")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layers": 3}, "layers=3 is not accepted"),
        ({"kernels": 3.0}, "kernels=3.0 is not accepted; give a size such as 3"),
        ({"kernels": "3"}, "kernels='3' is not accepted"),
        ({"kernels": (1, 9)}, r"sizes 1 and 9; for one of both give \[\(1, 9\)\]"),
    ],
    ids=str,
)
def test_requests_of_another_kind_are_told(asked: dict, said: str) -> None:
    with pytest.raises(ExpandError, match=said):
        expand(nn.Sequential(one(nn.Conv2d(3, 3, (1, 9), padding=(0, 4)))), "RepConv", **asked)


def test_an_even_kernel_that_is_asked_for_by_its_size_is_refused() -> None:
    model = nn.Sequential(one(nn.Conv2d(3, 3, 3, padding=1)), one(nn.Conv2d(3, 3, 2)))
    assert len(multi_branch(expand(model, "RepConv"))) == 1
    with pytest.raises(ExpandError, match="1.0: k=2: a 1x1 branch can't be aligned with an even kernel"):
        expand(model, "RepConv", kernels=[2, 3])


def test_a_pruned_convolution_is_refused() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(ExpandError, match="0 is pruned or spectral-normed; make that lasting first"):
        expand(one(conv), "RepConv")


@pytest.mark.parametrize("name", ["DiverseBranchBlock", "RepConv"])
def test_synchronized_norms_stay_so(name: str) -> None:
    """Before and after: the stock conversion leaves the padding between a 1x1 and a 3x3 where it is."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(one(nn.Conv2d(4, 4, 3, padding=1)))).eval()
    after = expand(model, name)
    assert not any(type(m) is nn.BatchNorm2d for m in after.modules())
    before = nn.SyncBatchNorm.convert_sync_batchnorm(expand(nn.Sequential(one(nn.Conv2d(4, 4, 3, padding=1))).eval(), name))
    x = torch.rand(2, 4, 7, 9)
    for made in (after, before):
        assert verify(made, fuse(made), [x])


@pytest.mark.parametrize("name", sorted(APPLY - {"DilatedReparamBlock"}))
def test_channels_that_are_constant_in_the_batches_are_calibrated(name: str) -> None:
    """In float32, where a variance of zero would amplify rounding by 1 / sqrt(eps)."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        plain[0].bias[:4] = -3  # dead channels
    model = expand(plain, name, batches=[torch.rand(2, 4, 12, 12)])
    for x in (torch.rand(2, 4, 12, 12), torch.zeros(1, 4, 12, 12)):
        assert verify(plain, model, [x], tolerance=1e-6)
    assert verify(plain, expand(plain, name, batches=torch.zeros(2, 4, 12, 12)), [torch.rand(2, 4, 12, 12)], tolerance=1e-6)

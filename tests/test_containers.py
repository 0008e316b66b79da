"""The containers compute what they say, border and all, and are copied, pickled and differentiated like any module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNELS, SEEDS, laws, norms, numbers, pictures, same
from torch import nn
from torch.nn import functional as F

from rep_backbones.containers import (
    Block,
    Concat,
    Gate,
    PaddedBatchNorm2d,
    Parallel,
    PoolPyramid,
    Residual,
    Scale,
    Subsample,
)
from rep_backbones.rules import in_float64

RIMS = st.tuples(st.integers(0, 3), st.integers(0, 3))
C = 3


def conv(seed: int, c1: int = C, c2: int = C, **options) -> nn.Conv2d:
    made = nn.Conv2d(c1, c2, options.pop("k", 1), **options).double()
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(numbers(seed + index, *parameter.shape))
    return made.eval()


def padded_norm(padding: int | tuple[int, int] = 1) -> PaddedBatchNorm2d:
    made = PaddedBatchNorm2d(C, padding).double().eval()
    with torch.no_grad():
        made.bn.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        made.bn.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
        made.bn.running_mean.copy_(torch.tensor([1.0, 0.0, -4.0]))
        made.bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]).double() - made.bn.eps)
    return made


# ---- Parallel and Block --------------------------------------------------------------------------------------------------


@given(st.data())
@laws()
def test_parallel_is_the_sum_of_its_branches(data: st.DataObject) -> None:
    count, x = data.draw(st.integers(1, 4)), data.draw(pictures(C))
    branches = {f"b{i}": conv(i) for i in range(count)}
    expected = sum(F.conv2d(x, b.weight, b.bias) for b in branches.values())
    same(Parallel(branches)(x), expected)


def test_parallel_keeps_names_and_order() -> None:
    one, other = conv(0), conv(1)
    parallel = Parallel({"1x1": one, "a": other})
    assert list(parallel.items()) == [("1x1", one), ("a", other)] and len(parallel) == 2
    assert set(parallel.state_dict()) == {"1x1.weight", "1x1.bias", "a.weight", "a.bias"}


def test_one_module_on_two_branches_counts_twice() -> None:
    shared, x = conv(0), numbers(1, 2, C, 5, 4)
    parallel = Parallel({"a": shared, "b": shared})
    same(parallel(x), 2 * shared(x))
    same(in_float64(parallel)(x), 2 * shared(x))


def test_parallel_leaves_its_input_alone() -> None:
    x = numbers(0, 1, C, 4, 4)
    before = x.clone()
    Parallel({"a": nn.Identity(), "b": nn.Identity()})(x)
    assert torch.equal(x, before)


def test_parallel_without_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one branch, got none"):
        Parallel({})


def test_block_is_its_affine_part_and_then_its_tail() -> None:
    part, x = Parallel({"a": conv(0), "b": nn.Identity()}), numbers(2, 2, C, 5, 7)
    block = Block(part, gate=nn.Sigmoid(), act=nn.ReLU())
    assert block.affine_part is part
    assert [name for name, _ in block.named_children()] == ["branches", "gate", "act"]
    same(block(x), torch.relu(torch.sigmoid(part(x))))


# ---- what stands between blocks ------------------------------------------------------------------------------------------


@given(pictures(C))
@laws(15)
def test_residual_concat_and_gate(x: torch.Tensor) -> None:
    body, other = conv(0), conv(1, c2=2)
    same(Residual(body, nn.Identity())(x), F.conv2d(x, body.weight, body.bias) + x)
    same(Concat([body, other])(x), torch.cat([body(x), other(x)], 1))
    same(Gate(nn.AdaptiveAvgPool2d(1))(x), x * x.mean((2, 3), keepdim=True))


@given(pictures(C), st.sampled_from([3, 5, 7]))
@laws(15)
def test_pool_pyramid_doubles_its_field_each_time(x: torch.Tensor, k: int) -> None:
    """Two max poolings in series are one of 2k - 1, three one of 3k - 2."""
    wide = [F.max_pool2d(x, size, 1, size // 2) for size in (k, 2 * k - 1, 3 * k - 2)]
    same(PoolPyramid(k)(x), torch.cat([x, *wide], 1))


@given(pictures(C), st.booleans())
@laws(15)
def test_scale_is_one_factor_or_one_for_each_channel(x: torch.Tensor, per_channel: bool) -> None:
    scale = Scale(C, per_channel, value=0.25).double()
    same(scale(x), x * 0.25)
    assert scale.alpha.shape == ((C,) if per_channel else (1,))
    with torch.no_grad():
        scale.alpha.copy_(numbers(5, *scale.alpha.shape))
    expected = torch.stack([x[:, c] * scale.alpha[c if per_channel else 0] for c in range(C)], 1)
    same(scale(x), expected)
    same(in_float64(scale)(x), expected)


@given(pictures(C), st.integers(1, 4), SEEDS)
@laws()
def test_subsample_before_a_1x1_is_the_strided_one(x: torch.Tensor, stride: int, seed: int) -> None:
    pointwise = conv(seed, c2=4)
    expected = F.conv2d(x, pointwise.weight, pointwise.bias, stride)
    series = nn.Sequential(Subsample(stride), pointwise)
    same(series(x), expected)
    value = in_float64(series)
    assert (value.stride, value.padding, value.dilation) == ((stride, stride), (0, 0), (1, 1))
    same(value(x), expected)


# ---- padding with the affine bias ----------------------------------------------------------------------------------------


@given(st.data())
@laws()
def test_padded_norm_is_zero_padding_and_then_the_norm(data: st.DataObject) -> None:
    (ph, pw), x = data.draw(RIMS), data.draw(pictures(C))
    norm = data.draw(norms(C, (ph, pw)))
    zeros = F.pad(x, (pw, pw, ph, ph))
    bn = norm.bn
    expected = F.batch_norm(zeros, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    same(norm(x), expected, 1e-9)  # 1e-6 of variance and 1e-7 of eps scale by a thousand
    same(in_float64(norm)(x), expected, 1e-9)


def test_padded_norm_by_hand() -> None:
    norm = padded_norm((1, 2))
    # beta - mean * gamma / sqrt(var): 0 - 1 * 1/2, 1 - 0 * -2, 3 + 4 * 0.5 / 0.5
    border = torch.tensor([-0.5, 1.0, 7.0]).double()
    same(norm.border(), border)
    out = norm(torch.full((1, C, 1, 1), 3.0).double())
    assert out.shape == (1, C, 3, 5)
    same(out[0, :, 1, 2], torch.tensor([1.0, -5.0, 10.0]).double())  # the one pixel: border + 3 * gamma / sqrt(var)
    out[0, :, 1, 2] = border
    same(out, border.reshape(1, C, 1, 1).expand(1, C, 3, 5))


@given(st.data())
@laws()
def test_a_kernel_behind_a_padded_norm_folds_to_one_convolution(data: st.DataObject) -> None:
    """1x1, BN that pads, KxK that does not: the case that zero padding in the middle gets wrong at the border."""
    kernel = data.draw(KERNELS)
    rim = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    stride, seed = data.draw(st.integers(1, 2)), data.draw(SEEDS)
    norm = data.draw(norms(C, rim))
    model = nn.Sequential(conv(seed, c1=4, bias=False), norm, conv(seed + 9, c2=2, k=kernel, stride=stride)).eval()
    x = data.draw(pictures(4, least=kernel))
    value = in_float64(model)
    assert (value.kernel_size, value.padding, value.stride) == (kernel, rim, (stride, stride))
    expected = model(x).detach()
    same(value(x), expected, 1e-10 * max(1.0, float(expected.abs().max())))


def test_a_padded_norm_behind_a_bias_would_pad_with_something_else() -> None:
    """It pads with what it makes of zero, a 1x1 with a bias does not give zero outside the picture: refused."""
    model = nn.Sequential(conv(0), padded_norm(), conv(3, k=3))
    with pytest.raises(ValueError, match="1: .*not a convolution at the border"):
        in_float64(model)


def test_padded_norm_without_padding_is_the_norm() -> None:
    norm, plain, x = padded_norm(0), nn.BatchNorm2d(C).double().eval(), numbers(0, 2, C, 4, 3)
    plain.load_state_dict(norm.bn.state_dict())
    assert torch.equal(norm(x), plain(x))


def test_padded_norm_trains_on_the_picture_only() -> None:
    norm, plain, x = padded_norm(2).train(), nn.BatchNorm2d(C).double(), numbers(0, 4, C, 5, 3)
    plain.load_state_dict(norm.bn.state_dict())
    same(norm(x)[:, :, 2:-2, 2:-2], plain(x))
    assert torch.equal(norm.bn.running_mean, plain.running_mean) and torch.equal(norm.bn.running_var, plain.running_var)


def test_padded_norm_is_differentiable() -> None:
    norm, x = padded_norm((1, 0)), numbers(0, 2, C, 2, 3).requires_grad_()
    parameters = (norm.bn.weight, norm.bn.bias)

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return norm(x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


# ---- all of them ---------------------------------------------------------------------------------------------------------

ALL = [
    Parallel({"a": conv(0), "b": nn.Identity()}),
    Block(Parallel({"a": conv(0)}), act=nn.SiLU()),
    Residual(conv(0), nn.Identity()),
    Concat([conv(0), conv(1)]),
    Gate(nn.AdaptiveAvgPool2d(1)),
    PoolPyramid(3),
    Scale(C, True, 0.5).double(),
    Subsample(2),
    padded_norm((1, 2)),
]


@pytest.mark.parametrize("module", ALL, ids=lambda module: type(module).__name__)
def test_copies_and_pickles_compute_the_same(module: nn.Module) -> None:
    x = numbers(0, 2, C, 6, 5)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module) and torch.equal(again(x), module(x))
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", ALL, ids=lambda module: type(module).__name__)
def test_the_dtype_of_the_picture_is_kept(module: nn.Module, dtype: torch.dtype) -> None:
    x = numbers(0, 2, C, 6, 5).to(dtype)
    assert copy.deepcopy(module).to(dtype)(x).dtype == dtype

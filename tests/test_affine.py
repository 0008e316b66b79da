"""The laws of the algebra, over kernel sizes, strides, paddings, dilations, groups and biases, borders included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_backbones import affine
from rep_backbones.affine import AffineConv, AlgebraError, align

settings.register_profile("laws", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("laws")

ATOL = 1e-10
SIZE = st.integers(1, 5)
PAIR = st.tuples(SIZE, SIZE)
SMALL = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDING = st.tuples(st.integers(0, 3), st.integers(0, 3))


@st.composite
def values(draw, c1=None, c2=None, kernel=PAIR, stride=SMALL, padding=PADDING, dilation=SMALL, groups=None, bias=None):
    """A random map; channels are multiples of the groups."""
    g = draw(st.sampled_from([1, 2, 4])) if groups is None else groups
    c1, c2 = c1 or g * draw(st.integers(1, 3)), c2 or g * draw(st.integers(1, 3))
    k = draw(kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(c2, c1 // g, *k, generator=generator, dtype=torch.float64)
    with_bias = draw(st.booleans()) if bias is None else bias
    constant = torch.randn(c2, generator=generator, dtype=torch.float64) if with_bias else None
    return AffineConv(weight, constant, draw(stride), draw(padding), draw(dilation), g)


def picture(value: AffineConv, height: int = 17, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, value.in_channels, height, width, generator=generator, dtype=torch.float64)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=ATOL)


@given(values())
def test_from_conv_and_to_conv_are_inverses(value: AffineConv) -> None:
    conv = value.to_conv()
    again = AffineConv.from_conv(conv)
    x = picture(value)
    assert same(conv(x), value(x))
    for name in ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "out_channels"):
        assert getattr(again, name) == getattr(value, name), name
    assert torch.equal(again.weight, value.weight) and conv.bias is not None


@pytest.mark.parametrize(("padding", "kernel"), [("same", (3, 5)), ("valid", (2, 3)), (1, 3), ((0, 2), (1, 5))])
def test_every_spelling_of_padding(padding, kernel) -> None:
    conv = nn.Conv2d(3, 4, kernel, padding=padding, dilation=2 if padding == "same" else 1).double()
    value = AffineConv.from_conv(conv)
    assert same(value(picture(value)), conv(picture(value)))


@pytest.mark.parametrize(
    ("conv", "said"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect' is not affine"),
        (nn.Conv2d(2, 2, 2, padding="same"), "pads one side more"),
    ],
    ids=["reflect", "same with an even extent"],
)
def test_conv_that_is_no_value_is_refused(conv: nn.Conv2d, said: str) -> None:
    with pytest.raises(AlgebraError, match=said):
        AffineConv.from_conv(conv)


@given(values(), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_embedding_pads_by_the_padding_and_not_by_the_centre(value: AffineConv, rim: tuple[int, int]) -> None:
    kernel = (value.kernel_size[0] + 2 * rim[0], value.kernel_size[1] + 2 * rim[1])
    padding = tuple(p + d * r for p, d, r in zip(value.padding, value.dilation, rim))
    larger = value.embedded(kernel, padding, value.dilation)
    assert larger.kernel_size == kernel and same(larger(picture(value)), value(picture(value)))


@pytest.mark.parametrize(
    ("kernel", "padding", "into", "with_padding"),
    [
        ((1, 1), (0, 0), (3, 3), (1, 1)),
        ((1, 3), (0, 1), (3, 3), (1, 1)),
        ((3, 1), (1, 0), (3, 3), (1, 1)),
        ((2, 2), (0, 0), (4, 4), (1, 1)),
        ((3, 3), (1, 1), (7, 7), (3, 3)),
        ((3, 3), (0, 0), (5, 5), (1, 1)),
    ],
)
def test_embeddings_of_the_papers(kernel, padding, into, with_padding) -> None:
    value = AffineConv(torch.randn(3, 2, *kernel, dtype=torch.float64), None, (2, 1), padding)
    assert same(value.embedded(into, with_padding)(picture(value)), value(picture(value)))


@pytest.mark.parametrize(
    ("kernel", "padding", "into", "with_padding"),
    [
        ((1, 1), (0, 0), (2, 2), (1, 1)),  # an even kernel beside a 1x1 branch
        ((1, 1), (0, 0), (2, 2), (0, 0)),
        ((1, 1), (0, 0), (3, 3), (0, 0)),  # legal in the interior only
        ((3, 3), (1, 1), (1, 1), (0, 0)),
        ((3, 3), (2, 2), (5, 5), (2, 2)),
    ],
)
def test_embeddings_that_differ_at_the_border_are_refused(kernel, padding, into, with_padding) -> None:
    value = AffineConv(torch.randn(3, 2, *kernel), None, (1, 1), padding)
    with pytest.raises(AlgebraError, match="does not embed"):
        value.embedded(into, with_padding)


@given(values())
def test_undilated_and_dense_compute_the_same(value: AffineConv) -> None:
    x = picture(value)
    assert value.undilated().dilation == (1, 1) and same(value.undilated()(x), value(x))
    assert value.dense().groups == 1 and same(value.dense()(x), value(x))
    if value.groups == 4:
        assert value.regrouped(2).groups == 2 and same(value.regrouped(2)(x), value(x))
        with pytest.raises(AlgebraError, match="must divide"):
            value.regrouped(3)


@given(values(), st.booleans())
def test_scaling_and_shifting_are_of_the_output(value: AffineConv, one: bool) -> None:
    factor = torch.linspace(-1, 2, 1 if one else value.out_channels, dtype=torch.float64)
    shift = torch.linspace(3, -1, value.out_channels, dtype=torch.float64)
    expected = value(picture(value)) * factor.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    assert same(value.scaled(factor).shifted(shift)(picture(value)), expected)


@given(st.data())
def test_a_sum_is_the_sum_or_is_refused(data: st.DataObject) -> None:
    groups, stride = data.draw(st.sampled_from([1, 2])), data.draw(SMALL)
    both = [data.draw(values(4, 6, stride=st.just(stride), groups=groups)) for _ in range(2)]
    x = picture(both[0])
    try:
        total = both[0] + both[1]
    except AlgebraError:
        shapes = [[value(torch.zeros(1, 4, n, n + 1).double()).shape for n in range(13, 19)] for value in both]
        halves = [tuple(p - e / 2 for p, e in zip(v.padding, v.extent)) for v in both]
        dilated = both[0].dilation != both[1].dilation
        assert shapes[0] != shapes[1] or halves[0] != halves[1] or dilated, "refused though it is exact"
        return
    assert same(total(x), both[0](x) + both[1](x))


@given(st.data())
def test_branches_that_keep_the_size_always_add(data: st.DataObject) -> None:
    """Odd kernels with their own padding: what ACNet, RepVGG and UniRepLKNet sum."""
    kernels = data.draw(st.lists(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (1, 5)]), min_size=2, max_size=4))
    branches = []
    for k in kernels:
        d = data.draw(st.sampled_from([1, 2])) if k == (3, 3) else 1
        padding = (d * (k[0] // 2), d * (k[1] // 2))
        branches.append(data.draw(values(4, 4, st.just(k), st.just((1, 1)), st.just(padding), st.just((d, d)), groups=1)))
    x = picture(branches[0])
    total = sum(branches[1:], start=branches[0])
    assert same(total(x), sum(branch(x) for branch in branches))
    aligned = align(branches)
    assert len({(v.kernel_size, v.padding, v.dilation) for v in aligned}) == 1
    assert all(same(v(x), branch(x)) for v, branch in zip(aligned, branches))


@pytest.mark.parametrize(
    "changes", [{"stride": (2, 2)}, {"groups": 2}, {"c2": 6}, {"c1": 6}], ids=lambda changes: next(iter(changes))
)
def test_branches_that_do_not_fit_are_refused(changes) -> None:
    def made(c1=4, c2=4, stride=(1, 1), groups=1):
        return AffineConv(torch.randn(c2, c1 // groups, 1, 1), None, stride, (0, 0), (1, 1), groups)

    with pytest.raises(AlgebraError, match="parallel branches must have equal"):
        made() + made(**changes)


@settings(max_examples=150)
@given(st.data())
def test_a_series_is_the_series_or_is_refused(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2]))
    first = data.draw(values(4, 4, groups=groups, stride=st.sampled_from([(1, 1), (2, 1)])))
    second = data.draw(values(4, 6, groups=groups, padding=st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 2)])))
    x = picture(first, 40, 40)
    expected = second(first(x))
    try:
        total = first.then(second)
    except AlgebraError as error:
        assert any(second.padding), f"refused without padding between them: {error}"
        return
    assert same(total(x), expected)


@given(st.data())
def test_exact_series_are_not_refused(data: st.DataObject) -> None:
    """The second does not pad, or the first has extent 1 there and no bias."""
    groups = data.draw(st.sampled_from([1, 2]))
    pointwise = data.draw(st.booleans())
    none = st.just((0, 0))
    if pointwise:
        kernel, ones = st.just((1, 1)), st.just((1, 1))
        first = data.draw(values(4, 4, kernel, ones, none, ones, groups=groups, bias=False))
        second = data.draw(values(4, 6, groups=groups))
    else:
        first = data.draw(values(4, 4, groups=groups))
        second = data.draw(values(4, 6, padding=none, groups=groups))
    x = picture(first, 45, 43)
    assert same(first.then(second)(x), second(first(x)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv2d(3, 4, 1, bias=True), nn.Conv2d(4, 2, 3, padding=1)),  # off by 18 on unit data
        (nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, padding=1)),  # off by 39
    ],
    ids=["1x1 with a bias, then padding", "padding between two 3x3"],
)
def test_padding_between_two_convolutions_is_refused(first: nn.Conv2d, second: nn.Conv2d) -> None:
    with pytest.raises(AlgebraError, match="not a convolution at the border"):
        AffineConv.from_conv(first).then(AffineConv.from_conv(second))


@given(st.data())
def test_concatenation(data: st.DataObject) -> None:
    k, p, s, d = (st.just(data.draw(choice)) for choice in (PAIR, PADDING, SMALL, SMALL))
    parts = [data.draw(values(4, kernel=k, padding=p, stride=s, dilation=d, groups=1)) for _ in range(3)]
    x = picture(parts[0])
    assert same(affine.concat(parts)(x), torch.cat([part(x) for part in parts], 1))


@given(st.integers(1, 4), PAIR, SMALL)
def test_pooling_and_identity_as_values(channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2)
    like = torch.empty(0, dtype=torch.float64)
    x = torch.randn(2, channels, 11, 13, dtype=torch.float64)
    pooled = nn.AvgPool2d(kernel, stride, padding, count_include_pad=True)(x)
    assert same(affine.average_pool(channels, kernel, stride, padding, like)(x), pooled)
    assert same(affine.identity(channels, like)(x), x)
    assert same(affine.subsample(channels, stride, like)(x), x[:, :, :: stride[0], :: stride[1]])


@given(st.integers(1, 6), st.integers(0, 1000))
def test_batch_norm_as_a_value(channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels, eps=10 ** -float(torch.randint(2, 8, ()))).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 1e-8, 2)
    with torch.no_grad():
        norm.weight[0] = 1e-12
        x = torch.randn(2, channels, 5, 4, dtype=torch.float64)
        assert same(affine.batch_norm(norm)(x), norm(x))


def test_batch_norm_without_statistics_is_refused() -> None:
    with pytest.raises(AlgebraError, match="without running statistics"):
        affine.batch_norm(nn.BatchNorm2d(3, track_running_stats=False))


def test_the_algebra_is_differentiable() -> None:
    """Online re-parameterization folds inside `forward`."""
    torch.manual_seed(0)

    def folded(k3, b3, k1, k2, gamma):
        parallel = AffineConv(k3, b3, padding=(1, 1)) + AffineConv(k1) + affine.identity(2, k3)
        return [t for v in [parallel.scaled(gamma).then(AffineConv(k2))] for t in (v.weight, v.bias)]

    def identity_is_dense(k3, b3, k1, k2, gamma):
        parallel = AffineConv(k3, b3, padding=(1, 1)) + AffineConv(k1) + affine.identity(2, k3).dense()
        return [t for v in [parallel.scaled(gamma).then(AffineConv(k2))] for t in (v.weight, v.bias)]

    shapes = [(2, 2, 3, 3), (2,), (2, 2, 1, 1), (3, 2, 1, 1), (2,)]
    given_ = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with pytest.raises(AlgebraError, match="groups"):
        folded(*given_)
    assert torch.autograd.gradcheck(identity_is_dense, given_)

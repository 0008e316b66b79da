"""verify judges each output by its own range, never accepts NaN, and refuses what would prove nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, laws, numbers
from torch import nn

from rep_backbones import blocks, fuse, verify
from rep_backbones.verify import TOLERANCE, Difference, Report, tensors

NAN, INF = float("nan"), float("inf")
X = torch.linspace(0, 1, 60).reshape(1, 3, 4, 5)


class Outputs(nn.Module):
    """A module that gives what a function makes of its input; in eval mode."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Any) -> Any:
        return self.function(x)


def check(reference: Any, candidate: Any, batches: Any = X, **options: Any) -> Report:
    return verify(Outputs(reference), Outputs(candidate), batches, **options)


# ---- each output by its own range ----------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-6, 6), st.floats(-6, 6), st.sampled_from([0.2, 0.9, 1.1, 5.0]))
@laws()
def test_an_error_is_a_fraction_of_its_own_range(seed: int, small: float, large: float, times: float) -> None:
    """Whatever the scales of two outputs are, the one that is off by more than its tolerance fails and the other not."""
    x = numbers(seed, 2, 3, 4, 5)
    span = float(x.max() - x.min())
    tolerance = 1e-6
    wrong = torch.zeros_like(x)
    wrong[-1, -1, -1, -1] = times * tolerance * span  # one corner
    report = verify(
        lambda x: (x * 10**large, x * 10**small),
        lambda x: (x * 10**large, (x + wrong) * 10**small),
        [x],
        tolerance=tolerance,
    )
    first, second = report.differences
    assert first.ok and first.error == 0 and first.range == pytest.approx(span * 10**large)
    assert second.error == pytest.approx(times * tolerance, rel=1e-4) and second.range == pytest.approx(span * 10**small)
    assert second.ok is report.ok is bool(report) is (times < 1)
    assert report.error == second.error


def test_a_wrong_bias_behind_a_large_range_is_found() -> None:
    """A shift of 1e-5 is nothing beside boxes of 640 pixels, and a tenth of the range of fresh scores."""
    report = check(lambda x: {"boxes": x * 640, "scores": x * 1e-4}, lambda x: {"boxes": x * 640, "scores": x * 1e-4 + 1e-5})
    assert not report and [(d.name, d.ok) for d in report.differences] == [("boxes", True), ("scores", False)]
    assert report.differences[1].error == pytest.approx(0.1, rel=1e-4)
    lines = str(report).splitlines()
    assert lines[0].startswith("ok   output boxes: 0.0e+00 of its range 640 (accepted")
    assert lines[1].startswith("FAIL output scores: 1.0e-01 of its range 0.0001 (accepted")


def test_a_wrong_bias_in_a_fused_layer_is_found() -> None:
    torch.manual_seed(0)
    model = blocks.RepConv(3, 8, act=False).eval()
    fused = fuse(model)
    assert verify(model, fused, torch.randn(2, 3, 9, 7))
    with torch.no_grad():
        fused.get_submodule("0").bias[5] += 0.01
    assert not verify(model, fused, torch.randn(2, 3, 9, 7))


def test_the_range_is_over_all_batches() -> None:
    """A batch of constants has no range of its own; the one beside it has."""
    flat = torch.full_like(X, 0.5)
    for batches in ([X * 100, flat], [flat, X * 100]):
        report = check(lambda x: x, lambda x: x + 5e-4, batches)
        assert report.ok and report.batches == 2 and report.differences[0].range == pytest.approx(100)
    assert not check(lambda x: x, lambda x: x + 5e-4, [flat])


def test_the_range_is_the_reference_s() -> None:
    """A candidate that is a thousand times too large cannot excuse itself by its own range."""
    (found,) = check(lambda x: x, lambda x: x * 1000).differences
    assert found.range == 1 and found.error == pytest.approx(999)


def test_a_constant_output_is_measured_by_its_height() -> None:
    same, off = (check(lambda x: x * 0 + 2, lambda x, d=d: x * 0 + 2 + d) for d in (0, 1e-3))
    assert same.ok and not off.ok
    assert off.differences[0].range == 2 and off.error == pytest.approx(5e-4, rel=1e-3)
    assert check(lambda x: x * 0, lambda x: x * 0)
    assert not check(lambda x: x * 0, lambda x: x * 0 + 1e-20), "where all is zero, anything else is wrong"


def test_two_units_in_the_last_place_are_granted() -> None:
    """Values near 1 with a range of 1e-4 round to more than 1e-5 of it; a difference above that is still found."""
    near = 1 + X * 1e-4
    one = torch.finfo(torch.float32).eps
    assert verify(lambda x: x, lambda x: x + one, near)
    assert not verify(lambda x: x, lambda x: x + 4 * one, near)


# ---- NaN and infinity ----------------------------------------------------------------------------------------------------


def spoiled(value: float) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[7] = value
        return x

    return run


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_what_is_not_finite_is_never_ok(value: float, side: str) -> None:
    sides = {"reference": side != "candidate", "candidate": side != "reference"}
    functions = [spoiled(value) if sides[name] else torch.clone for name in sides]
    report = check(*functions, tolerance=1e9, resolution=1e9)
    assert not report and not report.ok and "FAIL output 0" in str(report)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_one_batch_is_not_forgotten(place: int) -> None:
    batches = [X, X * 2, X * 3]

    def run(x: torch.Tensor) -> torch.Tensor:
        return spoiled(NAN)(x) if x is batches[place] else x

    report = check(lambda x: x, run, batches)
    assert not report and report.error != report.error


def test_nan_in_one_output_is_the_error_of_all() -> None:
    for outputs in ([1e-9, NAN], [NAN, 1e-9]):
        report = Report([Difference(str(i), error, 1.0, 1e-5) for i, error in enumerate(outputs)], 1)
        assert report.error != report.error and not report.ok


# ---- tolerances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_tolerance_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    """Of the range: fp64 1e-9, fp32 1e-5, fp16 1e-3, bf16 1e-2."""
    expected = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    x = torch.linspace(-1, 1, 60).to(dtype)
    (found,) = verify(lambda x: x, lambda x: x, [x]).differences
    assert found.tolerance == max(expected, float(torch.finfo(dtype).eps))  # two units of a peak of 1, in a range of 2


def test_a_tolerance_of_one_s_own() -> None:
    assert not check(lambda x: x, lambda x: x + 1e-3)
    assert check(lambda x: x, lambda x: x + 1e-3, tolerance=2e-3)
    assert not check(lambda x: x, lambda x: x + 3e-3, tolerance=2e-3)


def test_a_resolution_is_absolute_and_not_counted() -> None:
    (found,) = check(lambda x: x * 10, lambda x: x * 10 + 0.25, resolution=0.2).differences
    assert found.error == pytest.approx(0.005, rel=1e-4), "the rest is"
    assert check(lambda x: x * 10, lambda x: x * 10 + 0.25, resolution=0.25001)
    (exact,) = check(lambda x: x, lambda x: x, resolution=0.2).differences
    assert exact.error == 0, "less than the resolution is no credit"


def test_one_wrong_tap_at_the_border_is_found() -> None:
    """A fold by the centre is right in the interior: the border alone decides."""
    right = nn.Conv2d(3, 4, 3, padding=1).eval()
    wrong = copy.deepcopy(right)
    report = verify(
        right, lambda x: torch.conv2d(nn.functional.pad(x, (1, 1, 1, 1), value=0.01), wrong.weight, wrong.bias), X
    )
    assert not report
    assert verify(lambda x: right(x)[..., 1:-1, 1:-1], lambda x: wrong(x)[..., 1:-1, 1:-1], X)


# ---- what is compared ----------------------------------------------------------------------------------------------------


def test_every_tensor_of_a_nest_is_named_by_its_place() -> None:
    nest = (X, [X, {"a": X, "b": (X,)}], torch.arange(3), "text", None)
    assert [name for name, _ in tensors(nest)] == ["0", "1.0", "1.1.a", "1.1.b.0"]
    assert [name for name, _ in tensors(X)] == ["0"]
    names = [d.name for d in check(lambda x: nest, lambda x: nest).differences]
    assert names == ["0", "1.0", "1.1.a", "1.1.b.0"]


def test_a_tensor_is_one_batch_and_an_iterator_is_many() -> None:
    assert check(lambda x: x, lambda x: x, X).batches == 1
    assert check(lambda x: x, lambda x: x, iter([X, X, X])).batches == 3


@pytest.mark.parametrize("off", [0.0, 2e-4, 0.5], ids=["same", "a little off", "far off"])
def test_batches_may_be_nests(off: float) -> None:
    """A module of several inputs takes a tuple: what is off is reported, as for a tensor."""
    report = check(lambda xs: xs[0] + xs[1], lambda xs: xs[0] + xs[1] + off, [(X, X)])
    assert report.ok is (off == 0) and report.error == pytest.approx(off / 2, abs=1e-7)


@pytest.mark.parametrize(
    "output", [torch.arange(3), torch.zeros(0, 4), [], None, "text"], ids=["integers", "empty", "list", "none", "text"]
)
def test_where_nothing_was_compared_nothing_is_proved(output: Any) -> None:
    report = check(lambda x: output, lambda x: output)
    assert not report and str(report) == "nothing was compared" and report.error != report.error


def test_models_are_left_as_they_are() -> None:
    model = blocks.RepConv(3, 3).eval()
    before = copy.deepcopy(model.state_dict())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("branches.kxk.conv").weight.mul_(1.0001)
    verify(model, broken, X)  # off by little: both are looked at in float64
    assert all(torch.equal(model.state_dict()[name], t) and t.dtype == before[name].dtype for name, t in before.items())


# ---- messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_batch_is_refused(batches: Any) -> None:
    with pytest.raises(ValueError, match="verify needs at least one batch, got none"):
        check(lambda x: x, lambda x: x, batches)


@pytest.mark.parametrize("who", ["reference", "candidate"])
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "one layer inside"])
def test_train_mode_is_refused_by_name(who: str, inner: bool) -> None:
    models = {name: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval() for name in ("reference", "candidate")}
    (models[who][1] if inner else models[who]).train()
    with pytest.raises(ValueError, match=rf"the {who} is in train mode.*call \.eval\(\) before verify"):
        verify(models["reference"], models["candidate"], X)


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (lambda x: x[:, :, 1:], r"output 0 has shape \(1, 3, 4, 5\) in the reference and \(1, 3, 3, 5\) in the candidate"),
        (lambda x: x[:, :1], r"and \(1, 1, 4, 5\) in the candidate"),  # would broadcast
        (lambda x: x.flatten(), r"and \(60,\) in the candidate"),
        (lambda x: (x, x), r"the reference gives outputs \['0'\], the candidate \['0', '1'\]; they must be the same"),
        (lambda x: {"a": x}, r"the candidate \['a'\]"),
        (lambda x: [], r"the candidate \[\]"),
    ],
    ids=["rows", "broadcast", "flat", "more", "named", "none"],
)
def test_outputs_that_do_not_match_are_refused(candidate: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(lambda x: x, candidate)

"""One pass for normalize, sum and activation: the function on any device, its kernels in the interpreter and compiled."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blocks import C1, NAMES
from test_recompute import assert_agree, layer, picture, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rep_backbones import one_pass
from rep_backbones.containers import Block, Parallel
from rep_backbones.one_pass import proof
from rep_backbones.one_pass.function import ACTIVATIONS, JointNorm, Reference
from rep_backbones.yolo.benchmarks import training
from rep_backbones.yolo.benchmarks.training import OnePass
from rep_backbones.yolo.training_cost import plain_twin, saved_bytes

HERE = Path(__file__).parent
# in training form their branches end in a norm each
SUMS_OF_NORMS = ["ACBlock", "DilatedReparamBlock", "DiverseBranchBlock", "MobileOneBlock", "RepConv", "RepVGGBlock"]
CHOSEN = one_pass.chosen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU stands for a GPU and the reference for the kernels; how often they were asked, by number of branches."""
    found: list[int] = []

    class Counting(Reference):
        def forward(self, xs: Any, *rest: Any) -> Any:
            found.append(len(xs))
            return super().forward(xs, *rest)

    counting = Counting()
    monkeypatch.setattr(one_pass, "chosen", lambda x: os.environ.get(one_pass.SWITCH) == "1")
    monkeypatch.setattr(one_pass, "_passes", lambda x: counting)
    return found


def assert_same(model: nn.Module, x: Tensor, tolerance: float = 1e-5, run: Any = lambda model, x: model(x)) -> None:
    plain = step(model, x, run)
    with one_pass.switched_on():
        assert_agree(step(model, x, run), plain, tolerance)


def errors(model: nn.Module, x: Tensor, exact: dict[str, Tensor]) -> float:
    """The largest in what a step computes with the switch on, each beside the largest value of its kind, or 1."""
    with one_pass.switched_on():
        found = step(model, x)
    return max(
        float((value.double() - exact[name].double()).abs().max() / max(1.0, float(exact[name].abs().max())))
        for name, value in found.items()
    )


# ---- the function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=[kind.__name__ for kind in ACTIVATIONS])
def test_gradients_are_those_of_differences(activation: int) -> None:
    """Also their own."""
    xs = [picture(2, (3, 4)) * (index + 1) for index in range(3)]
    weights, biases = ([torch.randn(2, dtype=torch.float64) for _ in xs] for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (*xs, *weights, *biases)]

    def run(*given: Tensor) -> Tensor:
        return JointNorm.apply(Reference(), len, 1e-3, activation, 3, *given)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_an_input_may_be_made_of_another() -> None:
    """As a block's identity and its convolutions; hooks on tensors are called once."""
    x, kernel = picture(2, (3, 4)).requires_grad_(), torch.randn(2, 2, 1, 1, dtype=torch.float64).requires_grad_()
    parameters = [torch.randn(2, dtype=torch.float64).requires_grad_() for _ in range(4)]

    def run(x: Tensor, kernel: Tensor, *parameters: Tensor) -> Tensor:
        xs = [x, torch.conv2d(x, kernel)]
        return JointNorm.apply(Reference(), len, 1e-3, 2, 2, *xs, *parameters)  # type: ignore[no-any-return]

    inputs = (x, kernel, *parameters)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    (once,) = torch.autograd.grad(run(*inputs).square().sum(), x)
    (graph,) = torch.autograd.grad(run(*inputs).square().sum(), x, create_graph=True)
    torch.testing.assert_close(once, graph, rtol=0, atol=1e-12)
    seen: list[Tensor] = []
    parameters[0].register_hook(seen.append)
    torch.autograd.grad(run(*inputs).square().sum(), parameters[0], create_graph=True)
    assert len(seen) == 1


@pytest.mark.parametrize("act", [True, False, nn.SiLU(), nn.Hardswish()], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_compute_the_same(name: str, act: Any, calls: list[int]) -> None:
    """Outputs, gradients and running statistics, in both layouts."""
    try:
        model = layer(name, act=act)
    except TypeError:
        pytest.skip("it has no activation of that kind")
    for form in (torch.contiguous_format, torch.channels_last):
        model, x = model.to(memory_format=form), picture(dtype=torch.float32).contiguous(memory_format=form)
        exact = step(copy.deepcopy(model).double(), x.double())
        error, plain = errors(model, x, exact), 0.0
        if error > 1e-5:  # DBB has gradients that are zero but for rounding, also without this
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one_pass, "chosen", lambda x: False)
                plain = errors(model, x, exact)
        assert error <= max(1e-5, 2 * plain)
    assert len(calls) >= 2 or name not in SUMS_OF_NORMS, "the branches ran as ever"


@pytest.mark.parametrize("changes", [{"s": 2}, {"g": "depthwise"}, {"k": 1}, {"p": 0}, {"se": True}, {"n": 1}], ids=str)
@pytest.mark.parametrize("name", ["RepVGGBlock", "MobileOneBlock", "DiverseBranchBlock"])
def test_their_options(name: str, changes: dict[str, Any], calls: list[int]) -> None:
    assert_same(layer(name, **changes), picture(dtype=torch.float32))
    assert calls


def test_under_autocast(calls: list[int]) -> None:
    """In bfloat16 the sum is rounded once, so it is nearer to float32's than three rounded norms."""

    def cast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    model, x = layer("ACBlock", act=False), picture(dtype=torch.float32)
    exact, plain = (step(model, x, run)["out"] for run in (lambda model, x: model(x), cast))
    with one_pass.switched_on():
        found = step(model, x, cast)["out"]
    assert (found - exact).abs().mean() < (plain - exact).abs().mean()
    assert calls == [3]


def test_under_checkpoint_and_other_hooks(calls: list[int]) -> None:
    x = picture(dtype=torch.float32)
    assert_same(layer("RepVGGBlock"), x, run=lambda model, x: checkpoint(model, x, use_reentrant=False))

    def packed(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_same(layer("RepVGGBlock"), x, run=packed)
    assert len(calls) == 3


def test_branches_keep_no_more_than_without(calls: list[int]) -> None:
    """What a 1x1 gives is computed again here too."""
    for name in SUMS_OF_NORMS:
        model, x = layer(name, 16, 16, act=nn.Identity()), torch.rand(2, 16, 24, 24, requires_grad=True)
        plainly = saved_bytes(model, x)
        with one_pass.switched_on():
            assert saved_bytes(model, x) <= plainly * 1.01
    assert len(calls) == len(SUMS_OF_NORMS)


# ---- where branches run as ever -------------------------------------------------------------------------------------------


def other_eps(parallel: Parallel) -> None:
    next(m for m in parallel.modules() if isinstance(m, nn.BatchNorm2d)).eps = 1e-2


def frozen(parallel: Parallel) -> None:
    next(m for m in parallel.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def cumulative(parallel: Parallel) -> None:
    for module in parallel.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def hooked(parallel: Parallel) -> None:
    next(m for m in parallel.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(lambda *_: None)


def hooked_branch(parallel: Parallel) -> None:
    next(parallel.children()).register_forward_hook(lambda *_: None)


def without_a_norm(parallel: Parallel) -> None:
    parallel.add_module("more", nn.Identity())


def another_norm(parallel: Parallel) -> None:
    class Other(nn.BatchNorm2d):
        pass

    parallel.add_module("more", Other(C1))


def without_a_bias(parallel: Parallel) -> None:
    next(m for m in parallel.modules() if isinstance(m, nn.BatchNorm2d)).register_parameter("bias", None)


def shared(parallel: Parallel) -> None:
    parallel.add_module("more", nn.Sequential(nn.ReLU(), parallel.get_submodule("identity")))


def of_its_own(parallel: Parallel) -> None:
    norm = parallel.get_submodule("identity")
    norm.forward = lambda x: x * 2  # type: ignore[method-assign]


def without_statistics(parallel: Parallel) -> None:
    parallel.add_module("more", nn.BatchNorm2d(C1, track_running_stats=False))


@pytest.mark.parametrize(
    "change",
    [
        other_eps,
        frozen,
        cumulative,
        hooked,
        hooked_branch,
        without_a_norm,
        another_norm,
        without_statistics,
        without_a_bias,
        shared,
        of_its_own,
    ],
    ids=lambda change: change.__name__,
)
def test_branches_of_another_kind(change: Callable[[Parallel], None], calls: list[int]) -> None:
    model = layer("RepVGGBlock")
    change(model.get_submodule("branches"))  # type: ignore[arg-type]
    assert_same(model, picture(dtype=torch.float32), 0)
    assert not calls


def test_hooks_on_what_is_left_out_are_called(calls: list[int]) -> None:
    for path in ("branches", "act", ""):
        model, seen = layer("RepVGGBlock"), []
        model.get_submodule(path).register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        with one_pass.switched_on():
            model(picture(dtype=torch.float32))
        assert len(seen) == 1, path


def test_values_of_another_kind(calls: list[int]) -> None:
    """Two layouts, doubles: the norms then run as ever, behind the same convolutions, and keep as little."""

    class Flipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last)

    branches = {"a": nn.BatchNorm2d(C1), "b": nn.Sequential(Flipped(), nn.BatchNorm2d(C1))}
    assert_same(Block(Parallel(branches), act=nn.ReLU()).train(), picture(dtype=torch.float32), 1e-6)
    assert_same(layer("RepVGGBlock").double(), picture(), 1e-12)
    with one_pass.switched_on(), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer("RepVGGBlock")(torch.rand(1, C1, 1, 1))
    narrow = Parallel({"a": nn.BatchNorm2d(C1 - 1), "b": nn.BatchNorm2d(C1 - 1)}).train()
    with one_pass.switched_on(), pytest.raises(RuntimeError, match="running_mean"):
        narrow(picture(dtype=torch.float32))
    assert not calls


def test_where_values_are_of_another_kind_as_little_is_kept(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer("RepVGGBlock", 16, 16), torch.rand(2, 16, 24, 24, requires_grad=True)
    plainly = saved_bytes(model, x)
    monkeypatch.setattr(one_pass, "_aligned", lambda values, channels: False)
    with one_pass.switched_on():
        assert saved_bytes(model, x) == plainly
    assert not calls


def test_hooks_for_all_modules_see_all(calls: list[int]) -> None:
    x: Any = type("OnCuda", (), {"is_cuda": True})()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with one_pass.switched_on():
        assert not CHOSEN(x)
        handle.remove()
        assert CHOSEN(x)


def test_in_eval_mode_and_without_gradients_nothing_is_asked(calls: list[int]) -> None:
    model, x = layer("RepVGGBlock"), picture(dtype=torch.float32)
    with one_pass.switched_on():
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
    assert not calls


# ---- the switch ----------------------------------------------------------------------------------------------------------


def test_it_is_off_and_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True

    x: Any = OnCuda()
    monkeypatch.delenv(one_pass.SWITCH, raising=False)
    assert not one_pass.chosen(x)
    with one_pass.switched_on():
        assert one_pass.chosen(x) and not one_pass.chosen(torch.zeros(1))
        assert torch.func.vmap(lambda y: y * one_pass.chosen(x))(torch.ones(2)).sum() == 0
        with torch.autograd.forward_ad.dual_level():
            assert not one_pass.chosen(x)
    assert one_pass.SWITCH not in os.environ


def test_kernels_that_fail_are_not_used() -> None:
    """As on a GPU that Triton does not know; here there is none."""
    with pytest.warns(RuntimeWarning, match=f"{one_pass.SWITCH}=1 is without effect on cpu in torch.float16"):
        assert one_pass._proved(torch.device("cpu"), torch.float16) is None


def test_a_device_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not while a graph is recorded, when nothing can be looked at."""
    asked: list[Any] = []
    monkeypatch.setattr(one_pass, "_PROVED", {})
    monkeypatch.setattr(one_pass, "_proved", lambda *key: asked.append(key))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert one_pass._passes(torch.zeros(1)) is None and not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert one_pass._passes(torch.zeros(1)) is one_pass._passes(torch.zeros(1)) is None
    assert asked == [(torch.device("cpu"), torch.float32)]


@pytest.mark.parametrize("dtype", proof.DTYPES, ids=str)
@pytest.mark.parametrize(
    "place", ["output", "mean", "variance", "scale", "biases", "inputs", "weights", "bias", "all inputs"]
)
def test_a_wrong_result_is_found(place: str, dtype: torch.dtype) -> None:
    class Wrong(Reference):
        def forward(self, *given: Any) -> Any:
            y, statistics = super().forward(*given)
            rows = {"mean": 0, "variance": 5, "scale": 11, "biases": 12}
            if place == "output":
                y[..., -1] *= 1.05
            elif place in rows:
                statistics[rows[place], -1] *= 1.001
            return y, statistics

        def backward(self, *given: Any) -> Any:
            grads, weights, bias = super().backward(*given)
            if place == "inputs":
                grads[2][..., -1] *= 1.05
            elif place == "all inputs":
                grads[1] = grads[0]
            elif place == "weights":
                weights[1, -1] *= 1.001
            elif place == "bias":
                bias[-1] *= 1.001
            return grads, weights, bias

    small = proof.PROOF[:1]
    proof.compare(Reference(), torch.device("cpu"), dtype, (3,), small)
    with pytest.raises(RuntimeError, match="reference"):
        proof.compare(Wrong(), torch.device("cpu"), dtype, (3,), small)


# ---- the kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(HERE / "interpreted.py"), "float32", "float16"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    assert (done.returncode, done.stdout.strip()) == (0, "the same"), done.stderr


SIZES = ("pictures", "tiles", "pixels", "channels")
STEPS = ("picture_step", "channel_step", "pixel_step")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton's own
@pytest.mark.parametrize("ones", [("pixel_step",), ("channel_step", "pictures", "run", "runs"), ("tiles", "pixels", "run")])
@pytest.mark.parametrize(("capability", "dtype", "activation"), [(75, "fp16", 0), (80, "bf16", 2), (90, "fp32", 1)])
def test_kernels_compile_for_gpus(capability: int, dtype: str, activation: int, ones: tuple[str, ...]) -> None:
    """Arguments that are 1 are constants to Triton. No GPU is needed for this."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rep_backbones.one_pass import kernels

    count = 3
    values, floats = (f"*{dtype}",) * count, ("*fp32",) * count
    tile = {"BLOCK_C": 1, "BLOCK_P": 1024} if "pixel_step" in ones else {"BLOCK_C": 32, "BLOCK_P": 32}
    constants = {"B": count, "ROWS": 4, "RUNS": kernels.RUNS, "WANTED": 5, "ACTIVATION": activation, **tile}
    constants |= {name: 1 for name in ones}
    types: dict[str, Any] = {name: "i32" for name in (*SIZES, *STEPS, "run", "runs")}
    types |= {"xs": values, "grads": values, "y": values[0], "grad": values[0], "eps": "fp32"}
    types |= {"weights": floats, "biases": floats, "partial": "*fp32", "statistics": "*fp32", "sums": "*fp32"}
    for kernel in (kernels.moments, kernels.finish, kernels.apply, kernels.reduce, kernels.spread):
        given = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {name: "constexpr" if name in given else types[name] for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]


# ---- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", proof.DTYPES, ids=str)
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    from rep_backbones.one_pass import kernels

    proof.compare(kernels, torch.device("cuda"), dtype, range(2, one_pass.MOST + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_on_a_gpu(name: str, form: torch.memory_format) -> None:
    model = layer(name, 32, 32).cuda().to(memory_format=form)
    x = torch.randn(16, 32, 120, 120, device="cuda").contiguous(memory_format=form)
    exact = step(copy.deepcopy(model).double(), x.double())
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with one_pass.switched_on():
            found = step(model, x)
        plain = step(model, x)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for key, value in exact.items():
        ours, theirs = (float((each[key].double() - value).norm()) for each in (found, plain))
        assert ours <= 2 * theirs + 1e-6 * float(value.double().norm()), key


@pytest.mark.gpu
def test_a_gpu_uses_them() -> None:
    x = torch.randn(2, C1, 8, 8, device="cuda", requires_grad=True)
    with one_pass.switched_on():
        y = layer("RepVGGBlock").cuda().get_submodule("branches")(x)
    assert type(y.grad_fn).__name__ == "JointNormBackward"


def test_the_benchmark_switches_it_on_for_its_rows(calls: list[int]) -> None:
    model = layer("RepVGGBlock")
    copy.deepcopy(model)(picture(dtype=torch.float32))
    assert not calls
    OnePass(model)(picture(dtype=torch.float32))
    assert calls == [3]


def test_the_benchmark_has_a_row_with_it_on_a_gpu(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """For which the CPU stands."""
    place, noise = training._placed, training._noise
    monkeypatch.setattr(training, "_placed", lambda forms, device: place(forms, torch.device("cpu")))
    monkeypatch.setattr(training, "_noise", lambda shape, device, gradient: noise(shape, torch.device("cpu"), gradient))
    plan = replace(training.PLANS["quick"], runs=1)
    rows = training._layer("ACBlock", (1, 8, 8), torch.device("cuda"), plan)
    assert [row.of for row in rows] == [training.HERE, "this package, one pass"] and set(calls) == {3}
    detector = nn.Sequential(layer("RepVGGBlock", 3, 3))
    monkeypatch.setattr(training, "WithLoss", lambda model, pictures: model)
    forms = {training.TWIN: plain_twin(detector), "small": detector}
    assert [row.name for row in training._detector("small", forms, torch.device("cuda"), plan)] == [
        "small",
        "small, one pass",
    ]

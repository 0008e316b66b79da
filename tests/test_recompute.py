"""Training with branches keeps less than before and computes the same: outputs, gradients, statistics, and errors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from test_blocks import C1, C2, NAMES, accepted
from torch import Tensor, fx, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.utils.checkpoint import checkpoint

from rep_backbones import recompute
from rep_backbones.containers import Parallel
from rep_backbones.registry import LAYERS
from rep_backbones.yolo.training_cost import _Storages, plain_twin, saved_bytes

CHANGES: list[dict[str, Any]] = [
    {},
    {"s": 2},
    {"g": 4},
    {"g": "depthwise"},
    {"d": 2},
    {"k": 5, "s": (1, 2)},
    {"k": 1},
    {"p": 0},
    {"k": (1, 3)},
    {"se": True},
    {"n": 1},
]
CHEAP = ["RepVGGBlock", "MobileOneBlock", "DiverseBranchBlock", "QARepVGGBlockV2", "RepVGGDW"]  # each forgets something


@contextmanager
def plainly() -> Iterator[None]:
    """Everything is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "applies", lambda x: False)
        yield


def layer(name: str, c1: int = C1, c2: int = C1, **changes: Any) -> nn.Module:
    """In train mode, with random scales and biases."""
    if not accepted(LAYERS[name], changes):
        pytest.skip(f"{name} takes no {', '.join(changes)}")
    torch.manual_seed(0)
    try:
        made = LAYERS[name].cls(c1, c2, **changes).train()
    except ValueError as error:
        pytest.skip(f"{name} refuses {changes}: {error}")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return made


def picture(c: int = C1, size: tuple[int, int] = (13, 9), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, c, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


Run = Callable[[nn.Module, Tensor], Tensor]


def step(model: nn.Module, x: Tensor, run: Run = lambda model, x: model(x), inside: bool = False) -> dict[str, Tensor]:
    """All that a training step of a copy computes; the layer's input is the output of another operator."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    weights = torch.linspace(0.5, 1.5, 7).to(x.device)
    out = run(model, x * 1)
    loss = (out.flatten()[: out.numel() // 7 * 7].view(-1, 7) * weights).square().mean()
    loss.backward()
    assert x.grad is not None
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "gradient of x": x.grad, **grads, **dict(model.named_buffers())}


def assert_agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        size = max(1.0, float(wanted[name].detach().double().abs().max()))
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_as_plain(model: nn.Module, x: Tensor, tolerance: float, run: Run = lambda model, x: model(x)) -> None:
    found = step(model, x, run)
    with plainly():
        assert_agree(found, step(model, x, run), tolerance)


# ---- the same function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("width", [C1, C2], ids=["same width", "other width"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_statistics(name: str, width: int, changes: dict[str, Any]) -> None:
    size = (35, 34) if "p" in changes else (13, 9)
    assert_same_as_plain(layer(name, C1, width, **changes).double(), picture(size=size), 1e-12)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_float32(name: str, format: torch.memory_format) -> None:
    x = picture(dtype=torch.float32).contiguous(memory_format=format)
    assert_same_as_plain(layer(name).to(memory_format=format), x, 1e-5)


@pytest.mark.parametrize("name", CHEAP)
def test_under_autocast(name: str) -> None:
    """Recomputed in the forward's dtype, wherever the backward is called."""
    x = picture(dtype=torch.float32)

    def cast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_same_as_plain(layer(name), x, 1e-6, cast)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_as_plain(layer(name), x, 1e-6)
        assert_same_as_plain(layer(name), x, 1e-6, lambda model, x: _uncast(model, x))


def test_as_much_is_forgotten_under_autocast() -> None:
    model, x = layer("RepVGGBlock"), picture(dtype=torch.float32).requires_grad_()

    def kept() -> int:
        with torch.autocast("cpu", torch.bfloat16):  # each with its own cache of weights
            return saved_bytes(model, x)

    with plainly():
        before = kept()
    assert before - kept() == 2 * x.numel()  # what the 1x1 convolution gives, two bytes each


def _uncast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return model(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHEAP)
def test_under_checkpoint(name: str, reentrant: bool) -> None:
    """It runs twice there, so the statistics move twice."""

    def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    assert_same_as_plain(layer(name).double(), picture(), 1e-12, checkpointed)


@pytest.mark.parametrize("name", CHEAP)
def test_beside_other_hooks(name: str) -> None:
    def packed(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_same_as_plain(layer(name).double(), picture(), 1e-12, packed)


@pytest.mark.parametrize("name", ["DiverseBranchBlock", "QARepVGGBlockV2"])
def test_a_pooling_does_not_read_its_input_in_the_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_a_number(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(torch.nan)

    empty = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", not_a_number)
    for form in (torch.contiguous_format, torch.channels_last):
        assert_same_as_plain(layer(name).double().to(memory_format=form), picture().contiguous(memory_format=form), 1e-12)


@pytest.mark.parametrize("frozen", ["weights", "all", "input"])
@pytest.mark.parametrize("name", CHEAP)
def test_where_something_has_no_gradient(name: str, frozen: str) -> None:
    model = layer(name).double()
    for parameter in model.parameters():
        parameter.requires_grad_(frozen == "input" or (frozen == "weights" and parameter.dim() == 1))
    assert_same_as_plain(
        model, picture(), 1e-12, lambda model, x: model(x.detach() + 0 * x.mean() if frozen == "input" else x)
    )


def test_a_picture_without_a_gradient() -> None:
    """The first layer of a network forgets as much."""
    model, x = layer("RepVGGBlock", C1, C2).double(), picture()
    with plainly():
        before = saved_bytes(model, x)
    assert before - saved_bytes(model, x) == x.nbytes * C2 / C1
    other = copy.deepcopy(model)
    model(x).square().sum().backward()
    with plainly():
        other(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters()):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_frozen_norms_and_convolutions_with_a_bias() -> None:
    def branch(k: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(C1, C1, k, padding=k // 2), nn.BatchNorm2d(C1))

    model = Parallel({"3x3": branch(3), "1x1": branch(1), "other": branch(1)}).double().train()
    model.get_submodule("other").get_submodule("1").eval()
    assert_same_as_plain(model, picture(), 1e-12)


def test_sums_of_other_shapes_and_dtypes() -> None:
    """Added in place only where that changes neither."""
    model = Parallel({"a": nn.Identity(), "b": nn.AdaptiveAvgPool2d(1), "c": nn.Identity()}).train()
    tiny = Parallel({"a": nn.AdaptiveAvgPool2d(1), "b": nn.AdaptiveAvgPool2d(1), "c": nn.Identity()}).train()
    for summed in (model, tiny):
        assert_same_as_plain(summed, picture(), 0)
    mixed = Parallel({"a": _To(torch.bfloat16), "b": _To(torch.bfloat16), "c": _To(torch.float32)}).train()
    assert mixed(picture().requires_grad_()).dtype == torch.float32
    assert_same_as_plain(mixed, picture(), 0)


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_what_a_branch_gives_is_not_changed() -> None:
    """A hook may hold the outputs of branches, and an identity gives the input itself."""
    model, x, seen = layer("RepVGGBlock").double(), picture().requires_grad_(), []
    parallel = model.get_submodule("branches")
    for branch in parallel.children():
        branch.register_forward_hook(lambda module, given, out: seen.append((out, out.detach().clone())))
    model(x)
    Parallel({"a": nn.Identity(), "b": nn.Identity(), "c": nn.Identity()}).train()(y := x * 1)
    assert len(seen) == 3 and all(torch.equal(out, then) for out, then in seen) and torch.equal(y, x)


# ---- gradients of gradients, other ways to differentiate ------------------------------------------------------------------


@pytest.mark.parametrize("name", CHEAP)
def test_gradients_are_those_of_differences(name: str) -> None:
    """Also their own gradients. DBB pads with running statistics, which must stand still for that."""
    model = layer(name, 2, 2).double()
    model._modules["act"] = nn.Tanh()  # smooth
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    names, values = zip(*((key, p.detach().clone().requires_grad_()) for key, p in model.named_parameters()))

    def run(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, given)), (x,))

    inputs = (picture(2, (5, 3)).requires_grad_(), *values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-5)


def test_in_transforms_of_functions() -> None:
    model = layer("RepVGGBlock").double()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()

    def gradients() -> dict[str, Tensor]:
        return torch.func.grad(loss)(parameters, {k: b.clone() for k, b in model.named_buffers()}, picture())

    found = gradients()
    with plainly():
        assert_agree(found, gradients(), 1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # PyTorch's own, at the first use
def test_forward_mode() -> None:
    def tangent() -> dict[str, Tensor]:
        with dual_level():
            out = unpack_dual(layer("RepVGGBlock").double()(make_dual(picture(), picture().flip(2)))).tangent
            assert out is not None
            return {"tangent": out.detach()}

    found = tangent()
    with plainly():
        assert_agree(found, tangent(), 1e-12)


def test_a_graph_that_is_kept_runs_twice_and_a_freed_one_is_refused() -> None:
    model, x = layer("RepVGGBlock").double(), picture().requires_grad_()
    loss = model(x).square().sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("what", ["weight", "input"])
def test_what_was_changed_in_between_is_refused(what: str) -> None:
    model, x = layer("RepVGGBlock").double(), picture().requires_grad_()
    loss = model(given := x * 1).square().sum()
    with torch.no_grad():
        (model.get_parameter("branches.1x1.conv.weight") if what == "weight" else given).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- several processes ---------------------------------------------------------------------------------------------------


class SyncBatchNorm(torch.autograd.Function):
    """Stands for PyTorch's, which runs on GPUs only: its name, and what it keeps, which is always contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        out, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        ctx.save_for_backward(x, weight, mean, invstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        run = torch.ops.aten.native_batch_norm_backward
        return run(grad, x, weight, None, None, mean, invstd, True, 1e-5, [True] * 3)


class Synchronized(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return SyncBatchNorm.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_synchronized_norms(format: torch.memory_format) -> None:
    model, x = layer("RepVGGBlock").double().to(memory_format=format), picture().contiguous(memory_format=format)
    for branch in model.get_submodule("branches").children():
        if isinstance(branch, nn.Sequential):
            branch._modules["bn"] = Synchronized(C1).double()
    assert_same_as_plain(model, x, 1e-12)
    with plainly():
        before = saved_bytes(model, x.requires_grad_())
    assert before - saved_bytes(model, x) == x.nbytes


def test_the_node_of_synchronized_norms_has_the_name_that_is_known() -> None:
    from torch.nn.modules._functions import SyncBatchNorm as theirs

    assert f"{theirs.__name__}Backward" in recompute.NORMS


# ---- what is kept --------------------------------------------------------------------------------------------------------

KEPT = {
    "RepVGGBlock": 1.0,
    "RepConv": 1.0,
    "RepConvN": 1.0,
    "RepVGGDW": 1.0,
    "ReparamLargeKernelConv": 1.0,
    "BottleRep": 1.0,
    "MobileOneBlock": 2.0,
    "ACBlock": 5 / 3,
    "QARepVGGBlockV2": 4 / 3,
    "DilatedReparamBlock": 1.5,
    "DiverseBranchBlock": 2.4,
}


@pytest.mark.parametrize("name", NAMES)
def test_activations_kept(name: str) -> None:
    """In multiples of the plain twin's, and never more than is kept without this."""
    model, x = layer(name, 32, 32), torch.rand(2, 32, 24, 24, requires_grad=True)
    found = saved_bytes(model, x)
    with plainly():
        assert found <= saved_bytes(model, x)
    if name in KEPT:
        assert found / saved_bytes(plain_twin(model), x) == pytest.approx(KEPT[name], abs=0.02)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"g": "depthwise", "k": 3}, 0), ({"k": 1}, 4), ({"k": 3}, 4), ({"g": "depthwise", "k": 7}, 4)],
    ids=str,
)
def test_how_much_is_computed_again(changes: dict[str, Any], kept: int) -> None:
    """Of MobileOne's four convolutions and its 1x1: depthwise 3x3 and what takes a quarter of the dearest, no more."""
    model, x = layer("MobileOneBlock", 16, 16, act=False, **changes), torch.rand(2, 16, 24, 24, requires_grad=True)
    assert saved_bytes(model, x) == pytest.approx((1 + kept) * x.nbytes, rel=0.03)


def test_what_made_the_input_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity's norm keeps the input, which is kept anyway, though a 1x1 convolution made it."""
    model, calls, again = layer("RepVGGBlock"), [], recompute._again
    monkeypatch.setattr(recompute, "_again", lambda node: calls.append(node) or again(node))
    nn.Sequential(nn.Conv2d(C1, C1, 1, bias=False), model)(picture(dtype=torch.float32)).sum().backward()
    assert len(calls) == 1


def test_the_measure_is_that_of_saved_tensors() -> None:
    """Where nothing is forgotten, what is still there are the tensors that autograd's hooks see."""
    for name in NAMES:
        model, x = layer(name, 8, 8), torch.rand(2, 8, 12, 12, requires_grad=True)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        seen: dict[int, Any] = {}

        def keep(t: Tensor, own: set[int] = own, seen: dict[int, Any] = seen) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return t.detach()

        with plainly():
            found = saved_bytes(model, x)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                model(x)
        assert found == sum(storage.nbytes() for storage in seen.values()), name


@pytest.mark.parametrize("name", CHEAP)
def test_a_graph_goes_with_its_output(name: str) -> None:
    """No cycles, which would keep activations until Python looks for garbage."""
    model, x = layer(name), picture(dtype=torch.float32).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    gc.disable()
    try:
        with _Storages() as made:
            out = model(x * 1)
        assert sum(made.alive().values()) > 3 * x.nbytes
        del out
        assert not made.alive().keys() - own
    finally:
        gc.enable()


# ---- compilers and tracers see the plain formulation ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler asks a layer's input for it
@pytest.mark.parametrize("name", CHEAP)
def test_compiled_in_train_mode_without_a_break(name: str) -> None:
    model, x = layer(name).double(), picture()
    with plainly():
        wanted = step(model, x)
    assert_agree(step(model, x, lambda model, x: torch.compile(model, fullgraph=True, backend="eager")(x)), wanted, 1e-12)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traced_in_train_mode() -> None:
    model, x = layer("RepVGGBlock").double(), picture().requires_grad_()

    def traces() -> list[Any]:
        traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
        opened = [fx.symbolic_trace(part).code for part in (model, model.get_submodule("branches"))]
        return [[node.kind() for node in traced.inlined_graph.nodes()], *opened]

    found = traces()
    with plainly():
        assert found == traces()
    assert not recompute.applies(nn.Parameter(x)), "only plain tensors"
    assert_agree(step(model, x.detach(), lambda model, x: fx.symbolic_trace(model)(x)), step(model, x.detach()), 1e-12)


@pytest.mark.parametrize("name", CHEAP)
def test_not_in_eval_mode_nor_without_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(name), picture(dtype=torch.float32).requires_grad_()
    looked: list[Tensor] = []
    monkeypatch.setattr(recompute, "release", lambda x, ends: looked.append(x))
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert not looked, "at the graph"
    model(x)
    assert looked, "else the test could not fail"


# ---- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    x = picture(size=(33, 34), dtype=torch.float32).cuda()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype) if dtype != torch.float32 else nullcontext():
            return model(x)

    assert_same_as_plain(layer(name).cuda(), x, 1e-3, run)
    with torch.autocast("cuda", torch.float16):  # also of the backward, where a convolution would be cast
        assert_same_as_plain(layer(name).cuda(), x, 1e-5, _uncast)

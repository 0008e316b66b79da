"""Every registered layer, by registration: fused it computes the same, to the border, with any statistics and dtype."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import nn

from rep_backbones import equivalent_conv, fuse, verify
from rep_backbones.containers import Block
from rep_backbones.registry import LAYERS, Layer, layer_named, register_layer
from rep_backbones.rules import FoldError, branch_values, multi_branch

NAMES = sorted(name for name, layer in LAYERS.items() if layer.cls.__module__.startswith("rep_backbones."))
C1, C2 = 8, 12
CHANGES = [
    ("s", 2),
    ("g", 4),
    ("d", 2),
    ("k", 5),
    ("k", (1, 3)),
    ("se", True),
    ("n", 6),
    ("n", 1),
    ("act", False),
    ("p", 0),
    ("p", 3),
    ("g", "depthwise"),
    ("k", 1),
    ("k", 9),
]
VARIATIONS: list[dict[str, Any]] = [{}, *({key: value} for key, value in CHANGES)]


def accepted(layer: Layer, changes: dict[str, Any]) -> bool:
    taken = inspect.signature(layer.cls.__init__).parameters
    pairs = [key for key, value in changes.items() if isinstance(value, tuple)]
    return changes.keys() <= taken.keys() and all(str(taken[key].annotation) != "int" for key in pairs)


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics: negative and tiny gamma, large means, small variances; in float64 and eval mode."""
    torch.manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0, 1)
                module.weight[0] = 1e-7
                module.bias.normal_(0, 2)
                module.running_mean.normal_(0, 2)
                module.running_var.uniform_(0.01, 4)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "alpha":
                    parameter.normal_()
    return model


def built(name: str, changes: dict[str, Any], c1: int = C1, c2: int = C2) -> nn.Module:
    layer = LAYERS[name]
    if not accepted(layer, changes):
        pytest.skip(f"{name} takes no {', '.join(changes)}")
    try:
        return shuffled(layer.cls(c1, c2, **changes))
    except ValueError as error:
        pytest.skip(f"{name} refuses {changes}: {error}")


def pictures(channels: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, channels, *size).to(dtype) for size in ((13, 9), (8, 17), (5, 5))]


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("channels", [(C1, C2), (C1, C1)], ids=["other width", "same width"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_computes_the_same(name: str, channels: tuple[int, int], changes: dict[str, Any]) -> None:
    model = built(name, changes, *channels)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    large = [torch.randn(1, channels[0], 35, 34).double()] if "p" in changes else pictures(channels[0])
    report = verify(model, fused, large, tolerance=1e-11)
    assert report.ok, report
    assert multi_branch(fused) == [] and not any(isinstance(m, Block) for m in fused.modules())
    assert not any(type(m) is nn.BatchNorm2d for m in fused.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the original is left alone"
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) <= sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_do_not_change_the_shape_that_is_promised(name: str) -> None:
    """`(n, c1, h, w)` -> `(n, c2, h / s, w / s)`."""
    for s in (1, 2):
        if s == 1 or accepted(LAYERS[name], {"s": 2}):
            layer = LAYERS[name].cls(C1, C2, **({"s": s} if s > 1 else {}))
            assert layer.eval()(torch.randn(1, C1, 16, 12)).shape == (1, C2, 16 // s, 12 // s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = built(name, {}).to(dtype)
    fused = fuse(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    exact = model.double()
    x = pictures(C1)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert verify(exact, fused.double(), x, tolerance=tolerance), verify(exact, fused.double(), x, tolerance=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_copied_pickled_and_trained(name: str) -> None:
    model = LAYERS[name].cls(C1, C2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = pictures(C1, torch.float32)[0]
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again.eval()(x), model.eval()(x))
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_fusing_refuses_train_mode(name: str) -> None:
    with pytest.raises(FoldError, match=r"train mode.*model\.eval\(\)"):
        fuse(LAYERS[name].cls(C1, C2))


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_branches_sum_to_the_kernel(name: str) -> None:
    for path, layer, part in multi_branch(built(name, {}, C1, C1)):
        shares = branch_values(part)
        total = equivalent_conv(layer)
        assert torch.allclose(sum(value.weight for value in shares.values()), total.weight, rtol=0, atol=1e-12), path
        assert len({value.kernel_size for value in shares.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_equivalent_conv_is_what_fuse_puts_there(name: str) -> None:
    model = built(name, {}, C1, C1)
    fused = dict(fuse(model).named_modules())
    for path, layer, _ in multi_branch(model):
        there = fused[path]
        conv = there if isinstance(there, nn.Conv2d) else there[0]
        assert torch.allclose(equivalent_conv(layer).weight, conv.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k": 2}, "even kernel"),
        ({"g": 3}, "must divide c1=8 and c2=8"),
        ({"g": "dw"}, "or 'depthwise'"),
        ({"act": "Reluu"}, "not the name of a torch.nn class"),
        ({"act": 3}, "accepted are True, False"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["RepConv", "RepConvN", "RepVGGBlock"])
def test_bad_arguments_are_told(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        LAYERS[name].cls(C1, C1, **arguments)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown layer 'RepVGGBlok': did you mean RepVGGBlock"):
        layer_named("RepVGGBlok")


def test_registering_is_checked() -> None:
    class Own(nn.Module):
        def __init__(self, c1: int, c2: int) -> None:
            super().__init__()

    class Backwards(nn.Module):
        def __init__(self, c2: int, c1: int) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="belongs to rep_backbones.blocks"):
        register_layer(Own, name="RepConv")
    with pytest.raises(TypeError, match="the first arguments must be c1, c2; they are c2, c1"):
        register_layer(Backwards)
    with pytest.raises(ValueError, match="accepted are 'stage' and 'inside'"):
        register_layer(Own, repeats="twice")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module class"):
        register_layer(3)  # type: ignore[call-overload]


def test_published_counts_of_a_stage() -> None:
    """YOLOv6: of n repeats a BepC3 holds n // 2 BottleRep, at least 1, each with one learned alpha."""
    for n, expected in ((1, 1), (2, 1), (6, 3), (12, 6)):
        stage = LAYERS["BepC3"].cls(C1, C2, n)
        assert sum(type(m).__name__ == "BottleRep" for m in stage.modules()) == expected
        assert sum(name.endswith("alpha") and p.numel() == 1 for name, p in stage.named_parameters()) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [({"s": 0}, "s=0"), ({"k": 3.0}, "k=3.0"), ({"k": -1}, "k=-1"), ({"d": (1, 0)}, r"d=\(1, 0\)"), ({"p": -1}, "p=-1")],
)
def test_sizes_that_are_none_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} is not accepted; give a whole number from"):
        LAYERS["RepConv"].cls(8, 8, **given)

"""Every registered layer survives what people do to modules: channels_last, half, torch.compile, torch.export; gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from test_blocks import C1, C2, NAMES, shuffled
from torch import nn

from rep_backbones import fuse
from rep_backbones.affine import AffineConv
from rep_backbones.registry import LAYERS
from rep_backbones.rules import FoldError, equivalent

CHANNELS = 4


def layer(name: str) -> nn.Module:
    return shuffled(LAYERS[name].cls(C1, C2))


def picture(size: int = 20) -> torch.Tensor:
    return torch.randn(2, C1, size, size - 3, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str) -> None:
    model, x = layer(name), picture()
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for candidate in (last, fuse(last)):
        torch.testing.assert_close(candidate(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_half(name: str) -> None:
    """In bfloat16, which the CPU computes: nothing inside asks for a type of its own."""
    model = LAYERS[name].cls(C1, C2).eval()
    x = picture().float()
    expected = model(x).detach()
    half = copy.deepcopy(model).bfloat16()
    for candidate in (half, fuse(half)):
        out = candidate(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).abs().max() <= 0.1 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    model, x = LAYERS[name].cls(C1, C2), picture().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_exported(name: str) -> None:
    model, x = layer(name), picture()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_stages_hold_the_fused_form_of_their_parts(name: str) -> None:
    """A layer inside other layers, in lists and dictionaries."""
    held = nn.ModuleDict({"a": nn.ModuleList([layer(name)]), "b": nn.Sequential(layer(name))}).eval()
    fused = fuse(held)
    x = picture()
    torch.testing.assert_close(fused["a"][0](x), held["a"][0](x), rtol=0, atol=1e-10)
    torch.testing.assert_close(fused["b"](x), held["b"](x), rtol=0, atol=1e-10)


def linear_layers() -> list[str]:
    found = []
    for name in NAMES:
        try:
            equivalent(LAYERS[name].cls(CHANNELS, CHANNELS, act=False).double().eval()[0], CHANNELS)
        except (FoldError, TypeError):
            continue
        found.append(name)
    return found


def test_most_layers_have_a_value() -> None:
    assert len(linear_layers()) >= 12


@pytest.mark.parametrize("name", linear_layers())
def test_gradients_of_the_fold(name: str) -> None:
    """The fold is differentiable in every parameter: analytic against numeric gradients, in random directions."""
    torch.manual_seed(0)
    part = shuffled(LAYERS[name].cls(CHANNELS, CHANNELS, act=False))[0]
    names, values = zip(*((key, p.detach().clone().requires_grad_()) for key, p in part.named_parameters()))

    def fold(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = torch.func.functional_call(Folding(part), {f"part.{k}": v for k, v in zip(names, given)}, ())
        return value.weight if value.bias is None else (value.weight, value.bias)

    assert torch.autograd.gradcheck(fold, values, fast_mode=True, atol=1e-6)


class Folding(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self) -> AffineConv:
        return equivalent(self.part, CHANNELS)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_numbers(name: str) -> None:
    """On the meta device, where multiply-adds are counted and checkpoints are rebuilt."""
    with torch.device("meta"):
        model = LAYERS[name].cls(C1, C2).eval()
        assert model(torch.empty(2, C1, 20, 18)).shape[:2] == (2, C2)

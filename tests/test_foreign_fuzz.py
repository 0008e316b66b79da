"""Random graphs of layers, affine and not: no wrong one may be merged.

The judge knows nothing of measuring and proving: it follows each graph in the algebra of `affine.py`, and compares outputs
on pictures of its own.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from strategies import numbers
from torch import Tensor, nn
from torch.nn import functional as F

from rep_backbones import affine
from rep_backbones.affine import AffineConv, AlgebraError
from rep_backbones.foreign import fusing
from rep_backbones.foreign.fusing import fuse_measured

C, GRAPHS, FOLDERS = 3, 520, 8
KERNELS = [(1, 1), (3, 3), (1, 1), (3, 3), (1, 3), (3, 1)]
BENDS = {
    "relu": F.relu,
    "abs": torch.abs,
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "centre": lambda x: x - x.mean((2, 3), keepdim=True),
    "mirror": lambda x: x.flip(3),
    "clip": lambda x: x.clamp(-3e3, 3e3),
    "square": lambda x: x + 1e-4 * x * x,
}
Value = AffineConv | None  # None: no convolution


class Random(nn.Module):
    """A random graph, `(n, 3, h, w)` -> `(n, 3, h', w')`, and the affine value that the algebra gives it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int, int]] = []  # what, of which values, with which layer
        self.values: list[Value] = [affine.identity(C, torch.ones(1, dtype=torch.float64))]
        stride = self.rng.choice([1, 1, 1, 2])
        bent = self.rng.random() < 0.5
        for _ in range(self.rng.choice([1, 2, 2])):
            self._conv(0, stride)
        if stride == 1:
            self._step("same", 0)
        first = 1  # values from here on have one size
        for _ in range(self.rng.randint(1, 6)):
            a, b = (self.rng.randrange(first, len(self.values)) for _ in range(2))
            kind = self.rng.choice(["conv", "norm", "norm", "add", "add", "add", "scale", "average", "cat", "drop", "pad"])
            if bent and self.rng.random() < 0.3:
                kind = self.rng.choice(list(BENDS))
            self._conv(a, 1) if kind == "conv" else self._step(kind, a, b)
        if self.rng.random() < 0.7 and len(self.values) > 2:
            self._step("add", len(self.values) - 2, len(self.values) - 1)

    def _conv(self, a: int, stride: int) -> None:
        k, dilation, groups = self.rng.choice(KERNELS), self.rng.choice([1, 1, 2]), self.rng.choice([1, 1, C])
        padding = (dilation * (k[0] // 2), dilation * (k[1] // 2))
        layer = nn.Conv2d(C, C, k, stride, padding, dilation, groups, self.rng.random() < 0.5)
        self._step("layer", a, layer=layer)

    def _step(self, kind: str, a: int, b: int = 0, layer: nn.Module | None = None) -> None:
        made = {"norm": lambda: nn.BatchNorm2d(C), "cat": lambda: nn.Conv2d(2 * C, C, 1), "drop": lambda: nn.Dropout(0.5)}
        layer = layer or (made[kind]() if kind in made else nn.Identity())
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight, layer.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(layer.running_var, 0.3, 2.0)
        self.layers.append(layer.double())
        self.steps.append((kind, a, b, len(self.layers) - 1))
        try:
            value = self._value(kind, self.values[a], self.values[b], layer)
        except AlgebraError:
            value = None
        self.values.append(value)

    def _value(self, kind: str, a: Value, b: Value, layer: nn.Module) -> Value:
        if a is None or kind in BENDS or (b is None and kind in ("add", "cat")):
            return None
        if kind == "layer":
            return a.then(AffineConv.from_conv(layer), regroup=True)  # type: ignore[arg-type]
        if kind == "norm":
            return a.then(affine.batch_norm(layer))  # type: ignore[arg-type]
        if kind == "average":
            return a.then(affine.average_pool(C, (3, 3), (1, 1), (1, 1), a.weight), regroup=True)
        if kind == "scale":
            return a.scaled(torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)).shifted(torch.ones(C, dtype=torch.float64))
        if b is not None and kind == "add":
            return a.dense() + b.dense()
        if b is not None and kind == "cat":
            return affine.concat([a.dense(), b.dense()]).then(AffineConv.from_conv(layer))  # type: ignore[arg-type]
        return a  # "same", "drop", and "pad", which cuts again what it pads

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, a, b, index in self.steps:
            x, y, layer = values[a], values[b], self.layers[index]
            if kind == "add":
                new = torch.add(x, y)
            elif kind == "cat":
                new = layer(torch.cat([x, y], 1))
            elif kind == "average":
                new = F.avg_pool2d(x, 3, 1, 1)
            elif kind == "scale":
                new = x * torch.tensor([0.5, -2.0, 1.5], dtype=x.dtype).reshape(1, C, 1, 1) + 1
            elif kind == "pad":
                new = F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
            else:
                new = BENDS[kind](x) if kind in BENDS else layer(x)
            values.append(new)
        return values[-1]


def graph(seed: int) -> Random:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return Random(seed).eval()


def judged(model: Random, fused: nn.Module) -> None:
    for n, (h, w) in enumerate([(1, 1), (2, 3), (5, 4), (8, 9), (13, 7)]):
        x = numbers(1000 + n, 3, C, h, w) * (1e-3, 1.0, 1e4)[n % 3] + n
        with torch.no_grad():
            expected, got = model(x.clone()), fused(x)
        assert expected.shape == got.shape
        assert float((expected - got).abs().max()) <= 1e-9 * max(float(expected.abs().max()), 1e-12)
    if type(fused) is nn.Conv2d:
        oracle, found = model.values[-1], AffineConv.from_conv(fused)
        assert oracle is not None, "merged as a whole, where the algebra knows no convolution"
        a, b = affine.align([oracle.dense(), found.dense()])
        torch.testing.assert_close(b.weight.detach(), a.weight.detach(), rtol=0, atol=1e-9)
        bias = torch.zeros(C, dtype=torch.float64) if a.bias is None else a.bias.detach()
        torch.testing.assert_close(b.bias.detach(), bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("part", range(FOLDERS))
def test_no_wrong_graph_is_merged(part: int) -> None:
    whole = merged = left = 0
    for seed in range(part, GRAPHS, FOLDERS):
        model = graph(seed)
        fused, found = fuse_measured(copy.deepcopy(model), numbers(seed, 1, C, 9, 10))
        judged(model, fused)
        whole += type(fused) is nn.Conv2d
        merged += any(f.outcome == "merged" for f in found)
        left += type(fused) is Random
    assert whole > 5 and merged > whole and left > 5, "each kind is there"


def test_wrong_kernels_are_all_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is changed a little once it is measured; what stands in the model must be right all the same."""
    stock = fusing.measured
    rng = random.Random(0)

    def spoilt(*args: object) -> AffineConv:
        value = stock(*args)  # type: ignore[arg-type]
        index = rng.randrange(value.weight.numel())
        weight = value.weight.clone().flatten()
        weight[index] += 1e-6 * float(weight.abs().max()) + 1e-9
        return replace(value, weight=weight.reshape(value.weight.shape))

    monkeypatch.setattr(fusing, "measured", spoilt)
    tried = 0
    for seed in range(60):
        model = graph(seed)
        fused, found = fuse_measured(copy.deepcopy(model), numbers(seed, 1, C, 9, 10))
        assert type(fused) is Random and not any(f.outcome == "merged" for f in found)
        tried += bool(found)
    assert tried > 5


def test_the_judge_sees_a_wrong_kernel() -> None:
    seed = next(s for s in range(99) if type(fuse_measured(graph(s), numbers(s, 1, C, 9, 10))[0]) is nn.Conv2d)
    model = graph(seed)
    fused = fuse_measured(copy.deepcopy(model), numbers(seed, 1, C, 9, 10))[0]
    judged(model, fused)
    with torch.no_grad():
        fused.weight[0, 0, 0, 0] += 1e-6  # type: ignore[index]
    with pytest.raises(AssertionError):
        judged(model, fused)

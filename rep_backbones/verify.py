"""verify(): do two models compute the same, output by output?

Every output tensor is judged by its own range: boxes reach 640 while fresh scores stay near 1e-4, and one common range
would hide a wrong kernel behind the boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

HOPELESS = 1e-3  # of the range: a difference that no rounding in float32 explains


class Mismatch(ValueError):
    """Two models whose outputs cannot be compared: they have other numbers or shapes."""


@dataclass(frozen=True)
class Difference:
    """The largest difference in one output.

    Attributes:
        name: the output's place, such as "0" or "1.2".
        error: largest absolute difference as a fraction of `range`.
        range: largest minus smallest value of the reference, over all batches.
        tolerance: what `error` may be; more than asked for where two units in the last place of the output are more.
    """

    name: str
    error: float
    range: float
    tolerance: float

    @property
    def ok(self) -> bool:
        # NaN compares false with everything, so it is never ok.
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What `verify` found; true in a condition if everything is within tolerance."""

    differences: list[Difference] = field(default_factory=list)
    batches: int = 0

    @property
    def ok(self) -> bool:
        return bool(self.differences) and all(d.ok for d in self.differences)

    @property
    def error(self) -> float:
        """The largest error, NaN if any is NaN."""
        errors = [d.error for d in self.differences]
        return float("nan") if any(e != e for e in errors) else max(errors, default=float("nan"))

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [
            f"{'ok  ' if d.ok else 'FAIL'} output {d.name}: {d.error:.1e} of its range {d.range:.4g} (accepted "
            f"{d.tolerance:.0e})"
            for d in self.differences
        ]
        return "\n".join(lines) or "nothing was compared"


def verify(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    resolution: float = 0.0,
) -> Report:
    """Compare two models on batches, each output by its own range.

    Args:
        reference, candidate: modules in eval mode, or callables, that take a batch and give a tensor or a nest of them.
        batches: inputs; an iterable, or one tensor.
        tolerance: of every output; by default that of its dtype (fp32 1e-5, fp16 1e-3).
        resolution: an absolute difference that the runtime of the candidate makes of itself, not counted as an error.

    Differences over the tolerance in float32 are measured again in float64: they count if storing the kernels in float32
    does more than the reference's own rounding does.

    Raises:
        Mismatch: the outputs have other numbers or shapes, so that the models compute something else.
        ValueError: in train mode, or without a batch.
    """
    for name, model in (("reference", reference), ("candidate", candidate)):
        if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
            raise ValueError(
                f"the {name} is in train mode, where batch normalization depends on the batch; call .eval() before verify"
            )
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    if not batches:
        raise ValueError("verify needs at least one batch, got none")
    report = _compare(reference, candidate, batches, tolerance, resolution)
    fp32 = all(isinstance(b, Tensor) and b.dtype == torch.float32 for b in batches)
    limit = TOLERANCE[torch.float32] if tolerance is None else tolerance
    modules = isinstance(reference, nn.Module) and isinstance(candidate, nn.Module)
    if report.error <= limit or not (fp32 and modules and report.error < HOPELESS):
        return report
    # A barely trained model amplifies rounding itself. In float64 its rounding is gone and a wrong kernel is not; what stays
    # is that the kernels are stored in float32, which may do as much as the reference's own rounding does.
    exact = _Exact(reference)
    own = {d.name: d.error for d in _compare(exact, reference, batches, limit, resolution).differences}
    stored = _compare(exact, _Exact(candidate), batches, limit, 0.0)
    differences = [replace(d, tolerance=max(limit * 1e-2, own[d.name])) for d in stored.differences]
    if all(d.ok for d in differences):
        return Report([replace(d, tolerance=max(limit, d.tolerance)) for d in differences], len(batches))
    return report


class _Exact:
    """A module in float64 on the CPU."""

    def __init__(self, module: Any) -> None:
        self._module = copy.deepcopy(module).double().cpu()

    def __call__(self, x: Tensor) -> Any:
        return self._module(x.double().cpu())


def _compare(reference: Any, candidate: Any, batches: list[Any], tolerance: float | None, resolution: float) -> Report:
    worst: dict[str, float] = {}
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    accepted: dict[str, float] = {}
    unit: dict[str, float] = {}
    for batch in batches:
        with torch.no_grad():
            expected, got = dict(tensors(reference(batch))), dict(tensors(candidate(batch)))
        if expected.keys() != got.keys():
            raise Mismatch(
                f"the reference gives outputs {sorted(expected)}, the candidate {sorted(got)}; they must be the same"
            )
        for name, a in expected.items():
            b = got[name]
            if a.shape != b.shape:
                raise Mismatch(
                    f"output {name} has shape {tuple(a.shape)} in the reference and {tuple(b.shape)} in the candidate"
                )
            if not a.numel():
                continue
            accepted[name] = tolerance if tolerance is not None else TOLERANCE.get(a.dtype, 1e-5)
            unit[name] = max(torch.finfo(t.dtype).eps for t in (a, b))
            x, y = a.detach().cpu().double(), b.detach().cpu().double()
            gap = float((x - y).abs().max())
            gap = gap if gap != gap else max(gap - resolution, 0.0)
            old = worst.get(name, 0.0)
            worst[name] = gap if gap != gap else (old if old != old else max(old, gap))
            low[name] = min(low.get(name, float("inf")), float(x.min()))
            high[name] = max(high.get(name, float("-inf")), float(x.max()))
    found = []
    for name, gap in worst.items():
        peak = max(abs(low[name]), abs(high[name]), torch.finfo(torch.float32).tiny)
        span = high[name] - low[name] or peak
        # values all near 1 with a range of 0.01 cannot be told apart to 1e-5 of it: each side rounds to its last place
        found.append(Difference(name, gap / span, span, max(accepted[name], 2 * unit[name] * peak / span)))
    return Report(found, len(batches))


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating point tensor of a nest of tuples, lists and mappings, by its place."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name or "0", output
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    for key, value in items:
        yield from tensors(value, f"{name}.{key}" if name else str(key))

"""From a proved ONNX file to an INT8 one whose loss is known: calibrated, cured, and where it must be kept in float in part.

Calibration and cures are chosen by the noise that they leave in the outputs on pictures that they have not seen. If the loss
of AP is over what is allowed then, the layers that do most harm are kept in float, as few as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization.calibrate import TensorsData
from torch import Tensor
from tqdm import tqdm

from rep_backbones.export import cures, quantize
from rep_backbones.export.quantize import Array, Parts
from rep_backbones.yolo.coco_ap import AP, Predict, coco_ap
from rep_backbones.yolo.dataset import DataSet
from rep_backbones.yolo.pictures import pictures

CALIBRATION, PROBE = 64, 6  # pictures that ranges are taken from, and others that the noise is measured on
SEARCHED = 500  # pictures at most that a search evaluates on; the result is evaluated on all
REFINED = 8  # layers kept in float at most, of which each is then tried in INT8 once more


@dataclass
class Tried:
    """One recipe: the noise it leaves, in decibels (more is better), and its AP where that was measured."""

    name: str
    sqnr_db: float
    ap: float | None = None
    chosen: bool = False


@dataclass
class Int8:
    """What was made, and how it was chosen."""

    model: onnx.ModelProto
    ap: AP
    float_ap: AP
    calibration: dict[str, Any]
    tried: list[Tried]
    kept_in_float: list[str] = field(default_factory=list)
    sensitivity: list[tuple[str, float]] = field(default_factory=list)  # the worst first

    @property
    def drop(self) -> float:
        """Lost AP in points, of 100."""
        return 100 * (self.float_ap.ap - self.ap.ap)

    def about(self) -> dict[str, Any]:
        """For the report."""
        return {
            "calibration": self.calibration,
            "tried": [asdict(tried) for tried in self.tried],
            "kept_in_float": self.kept_in_float,
            "sensitivity": [{"layer": name, "sqnr_db": noise} for name, noise in self.sensitivity],
            "drop": self.drop,
        }


Cure = Callable[[onnx.ModelProto, Sequence[str]], onnx.ModelProto]  # a float model, and the layers to be quantized


@dataclass(frozen=True)
class _Recipe:
    """A float model, the ranges in it, and cures that are right for quantized layers only, in order."""

    model: onnx.ModelProto
    ranges: TensorsData
    cures: tuple[Cure, ...] = ()

    def made(self, layers: Sequence[str]) -> onnx.ModelProto:
        model = self.model
        for cure in self.cures:
            model = cure(model, layers)
        return quantize.quantized(model, self.ranges, layers)


def make(
    source: Path,
    data: DataSet,
    *,
    names: dict[int, str],
    size: tuple[int, int],
    nc: int,
    rows: bool,
    max_drop: float,
    tell: Callable[[str], object],
) -> Int8:
    """Quantize the ONNX file `source`.

    Args:
        names: of the detector's classes, by index.
        size: (height, width) in pixels.
        nc: number of classes.
        rows: whether the file gives final rows, whose order says nothing about noise; its raw maps are compared then.
        max_drop: AP that may be lost, in points of 100.
        tell: gets a line of text at each step.

    Raises:
        ValueError: no picture to calibrate on.
    """
    exact = quantize.named(onnx.load(str(source)))
    layers = quantize.layers(exact)
    watched = quantize.tails(exact) if rows else []
    chosen, probe = _pictures(data.calibration, size)
    maker = _Maker(exact, layers, chosen, probe, _parts(nc, watched), watched)
    best, tried = maker.best_recipe(tell)
    # what is quantized is named now: its harm, layer by layer
    harm = sorted(maker.sensitivity(best), key=lambda pair: pair[1])
    searched = data.some(SEARCHED)

    def ap_of(model: onnx.ModelProto, on: DataSet, title: str) -> AP:
        return coco_ap(_predictor(model), on, names=names, size=size, title=title)

    float_ap = ap_of(exact, data, "evaluating float")
    plain_float = float_ap if searched is data else ap_of(exact, searched, "evaluating float on some")

    def enough(kept: Sequence[str]) -> bool:
        found = ap_of(maker.made(best, kept), searched, f"evaluating INT8, {len(kept)} layers in float")
        loss = 100 * (plain_float.ap - found.ap)
        tell(f"INT8 with {len(kept)} of {len(layers)} layers in float: AP {found.ap:.4f}, {loss:+.2f} points lost")
        return loss <= max_drop

    kept = smallest(enough, [name for name, _ in harm])
    made = maker.made(best, kept)
    ap = ap_of(made, data, "evaluating INT8")
    next(entry for entry in tried if entry.chosen).ap = ap.ap if not kept else None
    about = {"pictures": len(chosen), "data": data.name, "split": "train", "probe": len(probe), "max_drop": max_drop}
    return Int8(made, ap, float_ap, about, tried, kept, harm)


def smallest(enough: Callable[[Sequence[str]], bool], order: Sequence[str]) -> list[str]:
    """The shortest beginning of `order` that is enough, by bisection; then without those of it that are not needed.

    All of it is taken to be enough.
    """
    if enough([]):
        return []
    low, high = 0, len(order)  # the first `low` are not enough, the first `high` are
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle, high)
    kept = list(order[:high])
    if len(kept) <= REFINED:
        for name in kept[-2::-1]:  # the last one is needed, as one fewer was not enough
            without = [other for other in kept if other != name]
            if enough(without):
                kept = without
    return kept


class _Maker:
    """One float model, and what is needed to try recipes on it."""

    def __init__(
        self,
        exact: onnx.ModelProto,
        layers: Sequence[str],
        chosen: Sequence[Path],
        probe: Sequence[Array],
        parts: Parts,
        watched: Sequence[str],
    ) -> None:
        self.exact, self.layers, self.chosen, self.probe = exact, layers, chosen, probe
        self.parts, self.watched = parts, watched
        self.size = probe[0].shape[2:]
        run = quantize.Runner(self._watching(exact))
        self.truth = [parts(run(x)) for x in probe]

    def best_recipe(self, tell: Callable[[str], object]) -> tuple[_Recipe, list[Tried]]:
        """Each method of calibration, then each cure on top of the best so far; what helps is kept."""
        tried: list[Tried] = []
        best: _Recipe | None = None

        def attempt(name: str, recipe: _Recipe) -> bool:
            nonlocal best
            noise = self.noise(recipe.made(self.layers))
            better = all(noise > entry.sqnr_db for entry in tried)
            tried.append(Tried(name, noise))
            tell(f"INT8, {name}: {noise:.1f} dB{' (kept)' if better else ''}")
            if better:
                best = recipe
                for entry in tried:
                    entry.chosen = entry is tried[-1]
            return better

        method = ""
        for by in quantize.METHODS:
            try:
                ranges = quantize.calibrated(self.exact, self._batches(by), by)
            except ValueError as error:  # a layer that gives next to nothing has a range, but no histogram
                if not method:
                    raise
                tell(f"INT8, {by}: cannot be taken here ({error})")
                continue
            if attempt(by, _Recipe(self.exact, ranges)):
                method = by
        name = method
        equal, pairs = cures.equalized(self.exact)
        if pairs:
            title = f"{name} + equalization of {pairs} pairs"
            if attempt(title, _Recipe(equal, quantize.calibrated(equal, self._batches("equalization"), method))):
                name = title
        assert best is not None
        base = best.model
        means = cures.input_means(base, self._batches("bias correction"))
        for title, cure in (
            ("clipped kernels", cures.clipped),
            ("bias correction", lambda model, layers: cures.bias_corrected(model, layers, means)),
        ):
            if attempt(f"{name} + {title}", replace(best, cures=(*best.cures, cure))):
                name = f"{name} + {title}"
        return best, tried

    def noise(self, model: onnx.ModelProto) -> float:
        return quantize.measured(self._watching(model), self.truth, self.probe, self.parts)

    def sensitivity(self, recipe: _Recipe) -> Iterator[tuple[str, float]]:
        for name in tqdm(self.layers, desc="sensitivity", unit="layer"):
            yield name, self.noise(recipe.made([name]))

    def made(self, recipe: _Recipe, kept: Sequence[str]) -> onnx.ModelProto:
        """The quantized model with the layers `kept` in float."""
        left = set(kept)
        return recipe.made([name for name in self.layers if name not in left])

    def _batches(self, title: str) -> Iterator[Array]:
        for path in tqdm(self.chosen, desc=title, unit="picture"):
            yield pictures((self.size[0], self.size[1]), paths=[path]).numpy()

    def _watching(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return quantize.with_outputs(model, self.watched) if self.watched else model


def _pictures(paths: Sequence[Path], size: tuple[int, int]) -> tuple[list[Path], list[Array]]:
    """Evenly spread pictures to calibrate on, and others that the noise is measured on."""
    if not paths:
        raise ValueError("INT8 needs pictures to calibrate on: the data has none under `train:` or `val:`")
    step = max(len(paths) // (CALIBRATION + PROBE), 1)
    spread = list(paths[::step][: CALIBRATION + PROBE])
    probe = spread[:: max(len(spread) // PROBE, 1)][:PROBE]
    rest = [path for path in spread if path not in probe] or probe
    return rest, [pictures(size, paths=[path]).numpy() for path in probe]


def _parts(nc: int, watched: Sequence[str]) -> Parts:
    def split(outputs: list[Array]) -> dict[str, Array]:
        if watched:
            return dict(zip(watched, outputs, strict=True))
        first, *others = outputs
        parts = {"boxes": first[:, :4], "scores": first[:, 4 : 4 + nc], "extra": first[:, 4 + nc :]}
        parts |= {str(index): value for index, value in enumerate(others, 1)}
        return {name: part for name, part in parts.items() if part.size}

    return split


def _predictor(model: onnx.ModelProto) -> Predict:
    run = quantize.Runner(model)

    def predict(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(run(x.numpy())[0]))

    return predict

"""The tables and the picture of a study, and where a difference is more than noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_backbones.export import charts, svg
from rep_backbones.export.charts import Bar
from rep_backbones.export.files import replacing
from rep_backbones.export.latency import Latency
from rep_backbones.export.report import versions
from rep_backbones.yolo import pages
from rep_backbones.yolo.benchmarks.results import table
from rep_backbones.yolo.studies.costs import spread
from rep_backbones.yolo.studies.plan import BUDGETS, PLAIN, VARIANTS, Profile, Run

Results = Mapping[Run, Mapping[str, Any]]
STANDARD_ERRORS = 2.0  # what a difference of two means must exceed


@dataclass(frozen=True)
class Told:
    """A study as far as it has come.

    Attributes:
        wanted: all runs; `found` has the results of those that are done.
        costs: as `costs.main` writes them.
        epochs: by budget and variant.
        latencies: of the deployed forms, by variant.
        device: that was trained on.
    """

    profile: Profile
    wanted: Sequence[Run]
    found: Results
    costs: Mapping[str, Any]
    epochs: Mapping[str, Mapping[str, int]]
    latencies: Mapping[str, Latency]
    device: str
    jobs: int
    threads: int
    command: str

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(run.data for run in self.wanted))

    def of(self, data: str, variant: str, budget: str) -> list[Mapping[str, Any]]:
        """The results of all seeds."""
        epochs = self.epochs[budget][variant]
        return [r for run, r in self.found.items() if (run.data, run.variant, run.epochs) == (data, variant, epochs)]

    def points(self, data: str, budget: str) -> dict[str, list[float]]:
        """AP of each variant, in points of 100, one for each seed; only of variants that have any."""
        found = {variant.name: [100 * r["ap"] for r in self.of(data, variant.name, budget)] for variant in VARIANTS}
        return {name: values for name, values in found.items() if values}


@dataclass(frozen=True)
class Difference:
    """Of a mean to the plain detector's, in points of AP, and its standard error; None where there is one seed only."""

    points: float
    error: float | None

    @property
    def verdict(self) -> str:
        if self.error is None:
            return "one seed: unknown"
        if abs(self.points) <= STANDARD_ERRORS * self.error:
            return "within the noise"
        return "better" if self.points > 0 else "worse"


def differences(points: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """Each variant's mean against the plain one's.

    The variance between seeds is that of all variants together, as three seeds of two of them say little about it: the
    standard error is `sd * sqrt(1 / n + 1 / n_plain)`.
    """
    if PLAIN not in points:
        return {}
    deviation = pooled(list(points.values()))
    plain = points[PLAIN]
    found = {}
    for name, values in points.items():
        if name != PLAIN:
            error = None if deviation is None else deviation * math.sqrt(1 / len(values) + 1 / len(plain))
            found[name] = Difference(statistics.mean(values) - statistics.mean(plain), error)
    return found


def pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, each about its own mean; None where no group has two values."""
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else None


# ---- the page -------------------------------------------------------------------------------------------------------------


def write(told: Told, out: Path, page: Path | None) -> None:
    """Write `study.md` and `study.svg` in `out`, and what is measured into `page`, with the picture in `pictures`.

    Raises:
        ValueError, TargetError: as `pages.fill`.
    """
    chart = picture(told)
    for folder in filter(None, (out, page and pictures(page))):
        if chart:
            with replacing(folder / "study.svg") as temporary:
                temporary.write_text(svg.alone(chart), encoding="utf-8")
    with replacing(out / "study.md") as temporary:
        temporary.write_text(text(told, "study.svg"), encoding="utf-8")
    if page:
        pages.fill(page, "tools/study.py", text(told, "pictures/study.svg"))


def text(told: Told, chart: str) -> str:
    """All of it in Markdown; `chart` is the picture's file."""
    parts = [*_about(told), *_costs(told), *_deployed(told)]
    if told.found:
        parts.append(f"![Differences of AP to the plain detector]({chart})")
    for data in told.data:
        for budget, meaning in BUDGETS.items():
            parts += _accuracy(told, data, budget, meaning)
    return "\n\n".join([*parts, *_noise(told)]) + "\n"


def _about(told: Told) -> Iterator[str]:
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    profile = told.profile
    yield f"Written by `{told.command}` on {time.strftime('%Y-%m-%d')} with {about}."
    seeds = len({run.seed for run in told.wanted})
    yield (
        f"One detector of 3x3 layers, {', '.join(map(str, profile.widths))} channels wide at strides 2 to 32, trained from "
        f"random weights at {profile.size} pixels with batches of {profile.training['batch']}: {profile.epochs} epochs, "
        f"{profile.training['optimizer']}, {seeds} seeds, on {told.device}, {told.jobs} at a time with {told.threads} "
        "threads each. AP by pycocotools, in points of 100, of the last epoch's weights, deployed as ONNX."
    )
    if len(told.found) < len(told.wanted):
        yield f"**Not complete: {len(told.found)} of {len(told.wanted)} runs are done.**"


def _costs(told: Told) -> Iterator[str]:
    yield "## What training costs"
    yield (
        "A step, forward, loss, backward and optimizer, all variants in turn: multiples of the plain detector's in the same "
        "round, median and quartiles. Memory: what is kept for the backward. Epochs: those of the two budgets."
    )
    rows = []
    for variant in VARIANTS:
        step = told.costs["steps"][variant.name]
        results = [r for run, r in told.found.items() if run.variant == variant.name]
        rows.append(
            [
                variant.name,
                variant.layer,
                f"{statistics.median(step['ms']):.0f}",
                spread(step["times"]),
                f"{step['memory']:.2f}",
                f"{results[0]['parameters_trained']:,}" if results else "",
                " / ".join(str(told.epochs[budget][variant.name]) for budget in BUDGETS),
            ]
        )
    yield table(["variant", "layer", "step, ms", "time", "memory", "parameters trained", "epochs"], rows)


def _deployed(told: Told) -> Iterator[str]:
    if not told.latencies:
        return
    yield "## What is deployed"
    yield (
        "The same network for all, by construction. Latency of one picture with ONNX Runtime on the CPU, in turn: median, "
        "smallest and largest. Error: the largest of all runs' ONNX files against what was trained, as a fraction of an "
        "output's range."
    )
    rows = []
    for name, latency in told.latencies.items():
        results = [r for run, r in told.found.items() if run.variant == name]
        first = results[0]
        rows.append(
            [
                name,
                str(first["convolutions"]),
                str(max(r["branches_left"] for r in results)),
                f"{first['parameters']:,}",
                f"{first['gflops']:.3f}",
                f"{latency.median_ms:.2f} ({latency.low_ms:.2f} to {latency.high_ms:.2f})",
                f"{max(r['error'] for r in results):.1e}",
            ]
        )
    header = ["variant", "convolutions", "branches left", "parameters", "GFLOPs", "latency, ms", "largest error"]
    yield table(header, rows)


def _accuracy(told: Told, data: str, budget: str, meaning: str) -> Iterator[str]:
    points = told.points(data, budget)
    if not points:
        return
    yield f"## {data}, {meaning.partition(',')[0]}"
    compared = differences(points)
    rows = []
    for name, values in points.items():
        results = told.of(data, name, budget)
        lost = [100 * (r["ap"] - r["int8_ap"]) for r in results]
        against = compared.get(name)
        rows.append(
            [
                name,
                str(told.epochs[budget][name]),
                f"**{statistics.mean(values):.2f}**{_deviation(values)}",
                ", ".join(f"{value:.1f}" for value in values),
                _signed(against) if against else "",
                against.verdict if against else "",
                f"{statistics.mean(100 * r['int8_ap'] for r in results):.2f}",
                f"{statistics.mean(lost):.2f} ({min(lost):.2f} to {max(lost):.2f})",
                " / ".join(f"{statistics.median(r[key] for r in results):.0f}" for key in ("seconds", "cpu_seconds")),
            ]
        )
    header = ["variant", "epochs", "AP", "each seed", "to plain", "", "INT8 AP", "INT8 loses", "seconds / of processors"]
    yield table(header, rows)


def _noise(told: Told) -> Iterator[str]:
    compared = [d for data in told.data for budget in BUDGETS for d in differences(told.points(data, budget)).values()]
    judged = [d for d in compared if d.error is not None]
    if not judged:
        return
    larger = sum(d.verdict != "within the noise" for d in judged)
    yield (
        "Noise: two standard errors of the difference of two means, with the standard deviation between seeds of all "
        f"variants together. {larger} of {len(judged)} differences are larger; of so many, about {len(judged) / 20:.0f} "
        "would be by chance where there is no difference at all."
    )


def picture(told: Told) -> str:
    """Differences to the plain detector with two standard errors on either side; "" where there are none yet."""
    kinds = [(data, budget) for data in told.data for budget in BUDGETS]
    compared = {kind: differences(told.points(*kind)) for kind in kinds}
    rows: list[tuple[str, list[Bar]]] = []
    for variant in VARIANTS:
        bars = []
        for hue, (data, budget) in enumerate(kinds):
            if found := compared[data, budget].get(variant.name):
                margin = STANDARD_ERRORS * (found.error or 0.0)
                label = f"{data}, same {budget}"
                bars.append(Bar(label, found.points, found.points - margin, found.points + margin, hue))
        if bars:
            rows.append((variant.name, bars))
    title = "points of AP more than the plain detector has, and two standard errors"
    return charts.dots(rows, title, mark=0.0, logarithmic=False) if rows else ""


def _deviation(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def _signed(found: Difference) -> str:
    return f"{found.points:+.2f}" + ("" if found.error is None else f" ± {STANDARD_ERRORS * found.error:.2f}")


def pictures(page: Path) -> Path:
    """The folder of a page's pictures."""
    return page.parent / "pictures"


def first_files(found: Results, wanted: Sequence[Run], out: Path) -> dict[str, Path]:
    """A deployed ONNX file of each variant that has one: of the first data, seed and budget."""
    files: dict[str, Path] = {}
    for run in wanted:
        file = out / run.place / "best_deploy.onnx"
        if run in found and run.variant not in files and file.exists():
            files[run.variant] = file
    return files

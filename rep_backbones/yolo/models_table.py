"""The table of docs/models.md: every model YAML of this package, counted in training and deployed, and timed as ONNX.

python tools/models_table.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from ultralytics import YOLO

from rep_backbones.export.latency import Latency, measure_apart
from rep_backbones.export.onnx_model import session
from rep_backbones.export.report import Counts, versions
from rep_backbones.yolo import artifacts, names, pages
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.deploy import save_deploy
from rep_backbones.yolo.devices import described
from rep_backbones.yolo.fuse_export import Settings, counts
from rep_backbones.yolo.published import PUBLISHED
from rep_backbones.yolo.shuffled import shuffled
from rep_backbones.yolo.switches import no_downloads, no_installs, quiet

TOOL = "tools/models_table.py"  # as in the mark of the page
SIZE = 640
SIZES = {"classify": 224}  # of the tasks that look at smaller pictures
STEP = 64  # which sides must be multiples of: the coarsest stride of any head
WITH = ("python", "torch", "ultralytics", "onnxruntime")
COUNTED = (
    "model",
    "parameters training",
    "deployed",
    "GFLOPs training",
    "deployed",
    "multi-branch layers",
    "convolutions training",
    "deployed",
)
TIMED = ("ONNX, ms", "smallest to largest")


@dataclass(frozen=True)
class Counted:
    """A model in its two forms, at `size` x `size` pixels."""

    name: str
    size: int
    before: Counts
    after: Counts

    def cells(self) -> list[str]:
        before, after = self.before, self.after
        assert not after.multi_branch_layers  # else `fuse` had raised
        numbers = f"{before.parameters:,} {after.parameters:,} {before.gflops:.1f} {after.gflops:.1f}"
        return [self.name, *numbers.split(), str(before.multi_branch_layers), str(before.convs), str(after.convs)]


def counted(name: str, folder: Path, *, size: int | None = None, export: bool = False) -> tuple[Counted, Path | None]:
    """A model with random statistics, counted as `fuse_export` does, and its ONNX file in `folder` if it is to be made.

    Args:
        name: of a model YAML.
        folder: for the files.
        size: pixels of a side; None for that of the model's task.

    Raises:
        FoldError, ExportFailed: as `fuse`, and as `artifacts.make`.
        RuntimeError: the ONNX file computes something else than the fused model.
    """
    torch.manual_seed(0)
    yolo = YOLO(name)
    model: Any = shuffled(yolo.model.eval())  # type: ignore[arg-type,union-attr]  # fresh norms let signals fade to zeros
    side = size or SIZES.get(yolo.task or "", SIZE)
    batch = torch.rand(1, model.yaml.get("channels", 3), side, side)
    before = counts(model, batch)
    file = folder / f"{Path(name).stem}.pt"
    deployed = save_deploy(model, file)
    del model, yolo  # half of the memory, which the export needs
    found = Counted(name, side, before, counts(deployed, batch))
    made = _exported(file, deployed, batch) if export else None
    file.unlink()
    return found, made


def _exported(file: Path, deployed: nn.Module, batch: torch.Tensor) -> Path:
    job = artifacts.Job(file, file, deployed, batch, Settings(), (batch.shape[2], batch.shape[3]))
    made = artifacts.make("onnx", job)
    if made.failures:
        raise RuntimeError(f"{file.stem}: {made.failures[0]}")
    return made.path


def timed(files: Mapping[str, tuple[Path, int]], runs: int) -> dict[str, Latency]:
    """ONNX files, each with the side of its pictures, one picture at a time on the CPU, in turn.

    They are opened anew in each round: all of them together need more memory than many a machine has.
    """
    with tqdm(total=runs * len(files), desc="timing", unit="model") as bar:

        def opened(file: Path, side: int) -> Callable[[], object]:
            bar.update()
            model = session(str(file))
            picture = torch.rand(1, 3, side, side).numpy()
            return partial(model.run, None, {model.get_inputs()[0].name: picture})

        return measure_apart({name: partial(opened, *about) for name, about in files.items()}, runs=runs)


def table(rows: Sequence[Counted], latency: Mapping[str, Latency]) -> str:
    """The models as a Markdown table; times only where there are some."""
    header = [*COUNTED, *(TIMED if latency else ()), "published"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = row.cells()
        if latency:
            taken = latency[row.name]
            cells += [f"{taken.median_ms:.0f}", f"{taken.low_ms:.0f} to {taken.high_ms:.0f}"]
        lines.append([*cells, PUBLISHED.get(Path(row.name).stem, "")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measured(models: Sequence[str], *, size: int | None, runs: int) -> str:
    """The part of the page between the marks, without its first line; `runs` of 0 measure no latency."""
    rows, files = [], {}
    with tempfile.TemporaryDirectory() as folder, _undisturbed():
        for name in (bar := tqdm(models, desc="counting", unit="model")):
            bar.set_postfix_str(name)
            row, file = counted(name, Path(folder), size=size, export=runs > 0)
            rows.append(row)
            if file:
                files[name] = file, row.size
        latency = timed(files, runs) if runs else {}
    rows.sort(key=lambda row: (_family(row.name), row.before.parameters))
    times = f" Times: batch 1, {described('cpu')}, median of {runs} rounds of all models." if runs else ""
    return f"{_sizes(rows)}.{times}\n\n{table(rows, latency)}"


def _family(name: str) -> str:
    """What the scales of a model share, whether they are one file or several: efficientrep for efficientrep-n.yaml."""
    stem = Path(name).stem
    return stem.rpartition("-")[0] or stem


def _sizes(rows: Sequence[Counted]) -> str:
    """What the pictures are of which GFLOPs are counted."""
    common = max(row.size for row in rows)
    others: dict[int, list[str]] = {}
    for row in rows:
        if row.size != common:
            others.setdefault(row.size, []).append(Path(row.name).stem)
    told = [f", of {n} x {n} for {' to '.join(dict.fromkeys([stems[0], stems[-1]]))}" for n, stems in others.items()]
    return f"Pictures of {common} x {common}" + "".join(told)


@contextmanager
def _undisturbed() -> Iterator[None]:
    with no_installs(), no_downloads(), quiet(True):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Count, measure, and put the table between the two marks of docs/models.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="models_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", metavar="PATTERN", help="models whose names match, such as 'repvgg-*': printed, if no --out"
    )
    parser.add_argument("--no-latency", action="store_true", help="count only, in a minute or two")
    parser.add_argument("--runs", type=int, default=5, help="rounds that are timed (default: 5)")
    parser.add_argument(
        "--imgsz", type=int, help=f"pixels of a side (default: {SIZE}, and {SIZES['classify']} for classifiers)"
    )
    parser.add_argument("--out", type=Path, help="file with the marks (default: docs/models.md, which has all models)")
    options = parser.parse_args(argv)
    command = shlex.join(["python", TOOL, *(sys.argv[1:] if argv is None else argv)])
    return ended("models_table", lambda: _write(options, command), interrupted="interrupted; the page is as it was")


def _write(options: argparse.Namespace, command: str) -> int:
    models = [name for name in names.packaged() if fnmatch(Path(name).stem, (options.only or "*").removesuffix(".yaml"))]
    if not models:
        raise ValueError(f"--only {options.only} matches no model; there are {', '.join(names.packaged())}")
    if options.runs < 1:
        raise ValueError(f"--runs {options.runs} is not accepted; give a whole number from 1, or --no-latency")
    if options.imgsz is not None and (options.imgsz < STEP or options.imgsz % STEP):
        raise ValueError(f"--imgsz {options.imgsz} is not accepted; give a multiple of {STEP}")
    page = options.out or (None if options.only else pages.ROOT / "docs" / "models.md")
    if page:
        pages.check(page, TOOL)
    about = ", ".join(f"{name} {version}" for name, version in versions().items() if name in WITH)
    body = measured(models, size=options.imgsz, runs=0 if options.no_latency else options.runs)
    body = f"Written by `{command}` on {time.strftime('%Y-%m-%d')} with {about}. {body}"
    if page:
        pages.fill(page, TOOL, body)
    else:
        print(body)
    return 0

"""Speed, memory and error of fusing and exporting: each pair in turn, in processes of their own, median and spread."""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import onnx
import torch
from torch import nn
from tqdm import tqdm
from ultralytics import YOLO

from rep_backbones.blocks import RepVGGBlock
from rep_backbones.export.onnx_fuse import fuse_onnx
from rep_backbones.fuse import fuse
from rep_backbones.registry import LAYERS
from rep_backbones.yolo.benchmarks.results import Findings, table
from rep_backbones.yolo.command import of_checkout
from rep_backbones.yolo.expanding import expand
from rep_backbones.yolo.pages import ROOT
from rep_backbones.yolo.shuffled import shuffled
from rep_backbones.yolo.switches import jit_unwarned

# Ding et al., "RepVGG", CVPR 2021, table 2: RepVGG-B3 has layers 1, 4, 6, 16, 1, widths 64 x [1, 3, 6, 12] and 512 x 5
B3 = ((64, 1), (192, 4), (384, 6), (768, 16), (2560, 1))
REPEATS = 5


def repvgg_b3(seed: int = 0) -> nn.Module:
    """The trunk of RepVGG-B3 with random statistics in its norms, in eval mode; 120,524,288 parameters with branches."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    c1 = 3
    for c2, blocks in B3:
        for index in range(blocks):
            layers.append(RepVGGBlock(c1, c2, s=1 if index else 2))
            c1 = c2
    return shuffled(nn.Sequential(*layers).eval())


# ---- what runs in a process of its own; each prints one JSON object -------------------------------------------------------


def job_fuse() -> dict[str, float]:
    """Seconds of fuse(), and its peak of memory over what the process had, in multiples of the model's own."""
    model = repvgg_b3()
    size = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    fuse(RepVGGBlock(8, 8).eval())  # what is imported at first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    fused = fuse(model)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 28
    return {"fuse RepVGG-B3, seconds": seconds, "memory added at its peak, in sizes of the model": peak / size}


def job_error() -> dict[str, float]:
    """The largest errors of the fused and of the unfused model in float32, against the unfused one in float64.

    oneDNN may convolve by Winograd's method, whose own rounding is several times that of a direct convolution, so both are
    measured without it too; and what storing the kernels in float32 does alone, computed in float64.
    """
    model = repvgg_b3()[:20].eval()  # type: ignore[index]
    fused = fuse(model)
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        found = {"fused in float32": fused(x), "unfused in float32": model(x)}
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            found |= {"fused in float32, without oneDNN": fused(x), "unfused in float32, without oneDNN": model(x)}
        found["fused, kernels in float32, computed in float64"] = copy.deepcopy(fused).double()(x.double())
    span = float(exact.max() - exact.min())
    return {f"{name}, fraction of the range": float((y.double() - exact).abs().max()) / span for name, y in found.items()}


def job_blocks() -> dict[str, float]:
    """The largest error of any registered layer, fused, in float32, against itself in float64."""
    torch.manual_seed(0)
    worst, direct, x = 0.0, 0.0, torch.randn(1, 64, 48, 48)
    for layer in LAYERS.values():
        model = shuffled(layer.cls(64, 64).eval())
        fused = fuse(model)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            ours = fused(x)
            with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
                slow = fused(x)
        span = float(exact.max() - exact.min())
        worst = max(worst, float((ours.double() - exact).abs().max()) / span)
        direct = max(direct, float((slow.double() - exact).abs().max()) / span)
    name = "every block fused in float32, the largest fraction of its range"
    return {name: worst, f"{name}, without oneDNN": direct}


def job_expand() -> dict[str, float]:
    """Seconds of expand() and fuse() on YOLO11n."""
    model = YOLO("yolo11n.yaml").model.eval()  # type: ignore[union-attr]
    fuse(RepVGGBlock(8, 8).eval())  # what is imported at first use
    start = time.perf_counter()
    fuse(expand(model, "DiverseBranchBlock"))
    return {"expand YOLO11n by DiverseBranchBlock and fuse it, seconds": time.perf_counter() - start}


def job_onnx() -> dict[str, float]:
    """Seconds of fusing an ONNX graph of 50 RepVGG layers with 128 channels, without its source."""
    model = shuffled(nn.Sequential(*[RepVGGBlock(128, 128) for _ in range(50)]).eval())
    with jit_unwarned(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (torch.rand(1, 128, 32, 32),), file, dynamo=False, opset_version=18)
        graph = onnx.load(file)
    start = time.perf_counter()
    _, fused = fuse_onnx(graph)
    seconds = time.perf_counter() - start
    assert len(fused) == 50
    return {"fuse an ONNX graph of 50 multi-branch layers, seconds": seconds}


JOBS: dict[str, Callable[[], dict[str, float]]] = {
    "fuse": job_fuse,
    "error": job_error,
    "blocks": job_blocks,
    "expand": job_expand,
    "onnx": job_onnx,
}


# ---- the table ------------------------------------------------------------------------------------------------------------

Row = tuple[str, list[float], str]  # what, the values, and what the project promises of it


def measured(device: torch.device, quick: bool, only: str, runs: int | None) -> Findings:
    """Fusing, which is done on the CPU whatever `device` is.

    Args:
        quick: the jobs of seconds alone, once.
        only: a pattern of the names of jobs, "imports" and "exports" among them.
        runs: of each; None for five.

    Raises:
        ValueError: nothing matches.
    """
    jobs = [name for name in (*JOBS, *PAIRS) if fnmatch(name, only) and not (quick and name not in QUICK)]
    if not jobs:
        raise ValueError(f"--only {only} matches nothing; there are {', '.join(QUICK if quick else (*JOBS, *PAIRS))}")
    found = rows(jobs, runs or (1 if quick else REPEATS))
    data = [{"measured": name, "values": values, "promised": promise} for name, values, promise in found]
    return Findings("Fusing and exporting", _text(found), data)


def rows(jobs: Sequence[str], repeats: int) -> list[Row]:
    """The jobs and pairs named, so many times."""
    taken: dict[str, list[float]] = {}
    promises = dict(PROMISES)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=repeats * len(jobs), desc="fuse", unit="job") as bar:
        for _ in range(repeats):
            for job in (name for name in jobs if name in JOBS):
                bar.set_postfix_str(job)
                for name, value in json.loads(_python("-m", "rep_backbones.yolo.benchmarks.fusing", job)).items():
                    taken.setdefault(name, []).append(value)
                bar.update()
        for name in (name for name in jobs if name in PAIRS):
            bar.set_postfix_str(name)
            commands, promise = PAIRS[name]
            pair = commands(Path(folder))
            for _ in range(repeats):
                for title, command in pair:  # in turn, so that a slow moment of the machine meets both
                    start = time.perf_counter()
                    _python(*command)
                    taken.setdefault(title, []).append(time.perf_counter() - start)
                bar.update()
            promises[pair[-1][0]] = promise
    return [(name, values, promises.get(name, "")) for name, values in taken.items()]


def _imports(folder: Path) -> list[tuple[str, list[str]]]:
    return [
        ("from ultralytics import YOLO, seconds", ["-c", "from ultralytics import YOLO"]),
        ("the same and import rep_backbones, seconds", ["-c", "from ultralytics import YOLO; import rep_backbones"]),
    ]


def _exports(folder: Path) -> list[tuple[str, list[str]]]:
    model = YOLO("efficientrep-s.yaml")
    shuffled(model.model)  # type: ignore[arg-type]
    model.save(folder / "best.pt")
    _python(str(ROOT / "tools" / "fuse_export.py"), str(folder / "best.pt"))
    stock = f"from ultralytics import YOLO; YOLO(r'{folder / 'best_deploy.pt'}').export(format='onnx')"
    return [
        ("stock export of efficientrep-s_deploy.pt to ONNX at 640 px, seconds", ["-c", stock]),
        (
            "tools/fuse_export.py of efficientrep-s.pt, latency measured too, seconds",
            [str(ROOT / "tools" / "fuse_export.py"), str(folder / "best.pt")],
        ),
        (
            "the same with --no-latency, proofs and report included, seconds",
            [str(ROOT / "tools" / "fuse_export.py"), str(folder / "best.pt"), "--no-latency"],
        ),
    ]


def _python(*arguments: str) -> str:
    env = of_checkout()
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as for whoever uses them
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _text(rows: Sequence[Row]) -> str:
    cells = [
        [name, _short(statistics.median(v)), f"{_short(min(v))} to {_short(max(v))}", str(len(v)), promise]
        for name, v, promise in rows
    ]
    return table(["measured", "median", "smallest to largest", "runs", "promised"], cells)


def _short(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2f}"


PAIRS: dict[str, tuple[Callable[[Path], list[tuple[str, list[str]]]], str]] = {
    "imports": (_imports, "at most 0.3 s more"),
    "exports": (_exports, "at most 1.5 times"),
}
QUICK = ("error", "blocks", "expand", "onnx", "imports")
PROMISES = {
    "fuse RepVGG-B3, seconds": "under 5",
    "memory added at its peak, in sizes of the model": "under 2.5",
    "fused in float32, fraction of the range": "at most 1e-6, or twice the unfused one's",
    "fused in float32, without oneDNN, fraction of the range": "the same",
    "every block fused in float32, the largest fraction of its range": "at most 1e-6",
    "every block fused in float32, the largest fraction of its range, without oneDNN": "the same",
    "expand YOLO11n by DiverseBranchBlock and fuse it, seconds": "under 3",
    "fuse an ONNX graph of 50 multi-branch layers, seconds": "under 5",
}


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]]()))

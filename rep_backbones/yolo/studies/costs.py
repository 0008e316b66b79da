"""What a training step of each variant costs, side by side, and what its deployed form takes."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rep_backbones.export.latency import Latency, measure
from rep_backbones.export.onnx_model import session
from rep_backbones.export.report import write_json
from rep_backbones.yolo.benchmarks.training import WithLoss
from rep_backbones.yolo.studies.plan import PLAIN, VARIANTS, built, optimizer_of
from rep_backbones.yolo.training_cost import step_costs

WARMUP = 3  # untimed rounds


def main(folder: Path) -> None:
    """Measure what `costs.json` in `folder` asks for, and put it there: `python -m ...studies.costs FOLDER`."""
    file = folder / "costs.json"
    asked = json.loads(file.read_text(encoding="utf-8"))["asked"]
    torch.set_num_threads(asked["threads"])
    device, batch = torch.device(asked["device"]), asked["batch"]
    x = torch.rand(batch, 3, asked["size"], asked["size"], generator=torch.Generator().manual_seed(0)).to(device)
    models = {v.name: built(v, folder / asked["models"][v.name]).to(device).train() for v in VARIANTS}
    optimizers = {v.name: optimizer_of(v, models[v.name]) for v in VARIANTS}
    losses = {name: WithLoss(model, batch).to(device).train() for name, model in models.items()}
    with tqdm(total=WARMUP + asked["rounds"], desc="steps", unit="round") as bar:
        found = step_costs(losses, x, asked["rounds"], WARMUP, each=bar.update, optimizers=optimizers)
    plain = found[PLAIN]
    steps = {
        name: {"ms": [1e3 * s for s in cost.seconds], "times": cost.times(plain), "memory": cost.memory(plain)}
        for name, cost in found.items()
    }
    write_json(file, {"asked": asked, "steps": steps})


def times(costs: Mapping[str, Any]) -> dict[str, float]:
    """The median step of each variant, as a multiple of the plain detector's in the same round."""
    return {name: statistics.median(step["times"]) for name, step in costs["steps"].items()}


def latencies(files: Mapping[str, Path], size: int, runs: int) -> dict[str, Latency]:
    """Of ONNX files, in turn, for one picture, with ONNX Runtime on the CPU."""
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
    calls = {}
    for name, file in files.items():
        opened = session(str(file))
        calls[name] = partial(opened.run, None, {opened.get_inputs()[0].name: x})
    return measure(calls, runs=runs, warmup=5, seconds=60.0)


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The median, and in brackets the quartiles."""
    if len(values) < 2:
        return form.format(values[0])
    low, _, high = statistics.quantiles(values, n=4)
    return f"{form.format(statistics.median(values))} ({form.format(low)} to {form.format(high)})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One run of the study, in a process of its own: train, fuse, export, prove, evaluate in float and in INT8.

python -m rep_backbones.yolo.studies.one FOLDER

The folder holds `run.json`; `result.json` comes last, so that a run that was stopped has none.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO

from rep_backbones.export.report import write_json
from rep_backbones.yolo import fuse_export, int8
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.studies.plan import written
from rep_backbones.yolo.switches import no_downloads, no_installs
from rep_backbones.yolo.trainer import RepTrainer


def prepare(folder: Path, spec: dict[str, Any], data: Path, threads: int) -> None:
    """Write what `main` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {"spec": spec, "data": str(data.resolve()), "threads": threads})


def result(folder: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """What the run found, or None if it did not end, or was another one."""
    found = read(folder / "result.json")
    return found if found.get("spec") == spec else None


def read(file: Path) -> dict[str, Any]:
    """The mapping of a JSON file; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main(folder: Path) -> None:
    """Do the run of a folder."""
    asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    spec, data = asked["spec"], Path(asked["data"])
    with no_installs(), no_downloads():
        start, cpu = time.perf_counter(), time.process_time()
        YOLO(written(spec["detector"], folder / "detector.yaml")).train(
            trainer=RepTrainer,
            data=str(data),
            imgsz=spec["size"],
            epochs=spec["epochs"],
            seed=spec["seed"],
            project=str(folder.resolve()),
            name="train",
            exist_ok=True,
            **spec["arguments"],
        )
        found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        found |= deployed(folder / "train" / "weights" / "best.pt", folder, data, spec["size"])
    write_json(folder / "result.json", {"spec": spec, **found})


def deployed(weights: Path, out: Path, data: Path, size: int) -> dict[str, Any]:
    """What is deployed of trained weights, counted, and its AP in float and in INT8.

    Raises:
        RuntimeError: a proof failed.
    """
    outcome = fuse_export.run(weights, formats=("onnx",), out=out, latency=False)
    if outcome.status != fuse_export.PROVED:
        raise RuntimeError("; ".join(outcome.report.failures))
    pictures, report = open_data(data), outcome.report
    made = int8.make(
        outcome.artifacts["onnx"],
        pictures,
        names=pictures.names,
        size=(size, size),
        nc=len(pictures.names),
        rows=False,
        max_drop=100.0,  # nothing is kept in float: what INT8 takes away is what is asked
        tell=print,
    )
    before, after = report.counts["before"], report.counts["after"]
    return {
        "ap": made.float_ap.ap,
        "ap50": made.float_ap.ap50,
        "int8_ap": made.ap.ap,
        "parameters_trained": before.parameters,
        "parameters": after.parameters,
        "convolutions": after.convs,
        "gflops": after.gflops,
        "branches_left": after.multi_branch_layers,
        "error": report.artifacts["onnx"]["error"],
        "bytes": report.artifacts["onnx"]["bytes"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

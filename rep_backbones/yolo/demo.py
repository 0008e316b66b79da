"""The whole way in minutes: draw a data set, train a small EfficientRep detector, fuse, export, prove, evaluate, show.

python tools/demo.py            # into ./demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ultralytics import YOLO

from rep_backbones.export.files import TargetError, replacing, writable_folder
from rep_backbones.yolo import fuse_export
from rep_backbones.yolo.forms import evaluated, onnx_predictor, table
from rep_backbones.yolo.gallery import gallery
from rep_backbones.yolo.shapes import NAMES, make_shapes
from rep_backbones.yolo.switches import no_installs, quiet
from rep_backbones.yolo.trainer import RepTrainer

SIZE = 160  # pixels
TRAINING = {
    "epochs": 12,
    "imgsz": SIZE,
    "batch": 8,
    "nbs": 8,
    "optimizer": "AdamW",
    "lr0": 0.0025,
    "lrf": 0.02,
    "cos_lr": True,
    "warmup_epochs": 0,
    "weight_decay": 0.01,
    "mosaic": 0.0,
    "seed": 0,
    "workers": 2,
    "device": "cpu",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status: 0, 2 (unwritable folder), 3 (a proof failed) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(prog="demo.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default: ./demo)")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    options = parser.parse_args(argv)
    try:
        return demo(writable_folder(options.out), options.epochs)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (TargetError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def demo(out: Path, epochs: int) -> int:
    """Run everything in `out`; returns the exit status of `fuse_export`."""
    start = time.monotonic()
    data = make_shapes(out / "data")
    _say(f"drew 400 pictures of {', '.join(NAMES)}s in {data.parent}")
    with no_installs():
        model = YOLO("efficientrep-n.yaml")
        settings = {**TRAINING, "epochs": epochs, "data": str(data), "project": str(out.resolve()), "name": "train"}
        with quiet():  # the progress bars stay
            model.train(trainer=RepTrainer, exist_ok=True, **settings)
    weights = out / "train" / "weights" / "best.pt"
    outcome = fuse_export.run(weights, formats=("onnx",), out=out, tell=_say)
    if outcome.status != fuse_export.PROVED:
        print("demo: " + "\n".join(outcome.report.failures), file=sys.stderr)
        return outcome.status
    annotations, images = data.parent / "annotations" / "instances_val.json", data.parent / "images" / "val"
    forms = evaluated(weights, outcome, annotations, images, SIZE)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(table(forms))
    gallery(
        onnx_predictor(outcome.artifacts["onnx"]),
        sorted(images.glob("*.jpg"))[:8],
        out / "detections.png",
        names=dict(enumerate(NAMES)),
        size=SIZE,
    )
    _say(f"{time.monotonic() - start:.0f} s; the picture is {out / 'detections.png'}\n\n{table(forms)}")
    return outcome.status


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)

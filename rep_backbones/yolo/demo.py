"""The whole way in minutes: draw a data set, train a small EfficientRep detector, fuse, export, prove, evaluate, show.

python tools/demo.py            # into ./demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from ultralytics import YOLO

from rep_backbones.export.files import replacing, writable_folder
from rep_backbones.yolo import fuse_export
from rep_backbones.yolo.backends import predictor
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.forms import evaluated, table
from rep_backbones.yolo.gallery import gallery
from rep_backbones.yolo.shapes import NAMES, make_shapes
from rep_backbones.yolo.switches import no_installs, quiet
from rep_backbones.yolo.trainer import RepTrainer

SIZE = 160  # pixels
LEARNED = 0.8  # AP50 that each form has after the default number of epochs
BAR = "{desc}: {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total}, {elapsed}<{remaining} {postfix}"
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
    return ended("demo", lambda: demo(writable_folder(options.out), options.epochs))


def demo(out: Path, epochs: int, train: int = 320, val: int = 80) -> int:
    """Run everything in `out` with so many pictures; returns the exit status of `fuse_export`."""
    start = time.monotonic()
    data = make_shapes(out / "data", train=train, val=val, size=SIZE)
    _say(f"drew {train + val} pictures of {', '.join(f'{name}s' for name in NAMES)} in {data.parent}")
    settings = {**TRAINING, "epochs": epochs, "data": str(data), "project": str(out.resolve()), "name": "train"}
    with no_installs(), quiet(), tqdm(total=epochs, desc="training", bar_format=BAR) as bar:
        model = YOLO("efficientrep-n.yaml")
        model.add_callback("on_train_batch_end", lambda trainer: bar.update(1 / len(trainer.train_loader)))
        model.add_callback("on_model_save", lambda trainer: bar.set_postfix_str(_reached(trainer)))
        model.train(trainer=RepTrainer, exist_ok=True, **settings)
    weights = out / "train" / "weights" / "best.pt"
    outcome = fuse_export.run(weights, formats=("onnx",), out=out, tell=_say)
    if outcome.status != fuse_export.PROVED:
        print("demo: " + "\n".join(outcome.report.failures), file=sys.stderr)
        return outcome.status
    pictures = open_data(data)
    forms = evaluated(weights, outcome, pictures, SIZE)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(table(forms))
    gallery(
        predictor(outcome.artifacts["onnx"]),
        [picture.path for picture in pictures.pictures[:8]],
        out / "detections.png",
        names=dict(enumerate(NAMES)),
        size=SIZE,
    )
    _say(f"{time.monotonic() - start:.0f} s; the picture is {out / 'detections.png'}\n\n{table(forms)}")
    worst = min(form.ap.ap50 for form in forms)
    if epochs >= int(str(TRAINING["epochs"])) and worst < LEARNED:
        print(f"demo: AP50 is {worst:.3f}, where {LEARNED} is to be expected: something is wrong here", file=sys.stderr)
        return fuse_export.UNPROVED
    return outcome.status


def _reached(trainer: Any) -> str:
    return f"AP50 {trainer.metrics.get('metrics/mAP50(B)', 0):.3f}"


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)

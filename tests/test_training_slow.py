"""Training in two processes, compiled, and with plots. Slow: `pytest -m slow`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import ultralytics
from ultralytics import YOLO
from yolo_helpers import MULTI_BRANCH, model_yaml, tiny_data, train_args  # noqa: F401

from rep_backbones.rules import multi_branch
from rep_backbones.yolo.checkpoint import load_precise
from rep_backbones.yolo.trainer import RepTrainer

pytestmark = pytest.mark.slow

WEIGHTS = ["best.pt", "best_deploy.pt", "best_fp32.pt", "last.pt"]
ROOT = Path(__file__).resolve().parents[1]


def check_run(run: Path, epochs: int, layers: int = 4) -> None:
    """The files of the hook are there, and are of the weights in best.pt."""
    with (run / "branches.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert all(0 <= float(row["fuse_error"]) < 1e-5 for row in rows)
    assert sorted(path.name for path in (run / "weights").iterdir()) == WEIGHTS
    best = load_precise(run / "weights" / "best.pt")
    assert best.precise and len(multi_branch(best.model)) == layers
    assert multi_branch(YOLO(str(run / "weights" / "best_deploy.pt")).model) == []


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        ("mixed", {}),
        ("trunk", {}),
        ("expand", {}),
        ("mixed", {"branches": "online"}),
        ("mixed", {"optimizer": "RepSGD"}),
    ],
    ids=["rows", "trunk", "expand", "online", "gradient"],
)
def test_two_processes_learn_the_same_and_one_writes(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    form: str,
    keys: dict[str, str],
) -> None:
    file = model_yaml(tmp_path, "Conv" if form == "expand" else form)
    if form == "expand":
        file.write_text(f"expand: ACBlock\n{file.read_text()}")
        layers = len(multi_branch(YOLO(str(file)).model))
        assert layers > 4, "the head's convolutions too"
    else:
        layers = MULTI_BRANCH[form]
    overrides = {"model": str(file), **train_args(tiny_data, tmp_path, **keys)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        # the package of the test, whatever is installed, and the versions that the caller put in front
        env = {**os.environ, **place, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), path])}
        command = [sys.executable, str(ROOT / "tests" / "gloo_trainer.py"), str(tmp_path / "meet"), str(tmp_path)]
        log = (tmp_path / f"log{rank}.txt").open("w")
        processes.append((subprocess.Popen([*command, json.dumps(overrides)], env=env, stdout=log, stderr=log), log))
    try:
        for rank, (process, _) in enumerate(processes):
            assert process.wait(300) == 0, (tmp_path / f"log{rank}.txt").read_text()[-4000:]
    finally:
        for process, log in processes:
            process.kill()
            process.wait()
            log.close()

    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["wrapped"] == second["wrapped"] == "DistributedDataParallel"
    assert first["steps"] == second["steps"] and len(set(first["steps"])) == len(first["steps"]) == 4
    assert first["parameters"] == second["parameters"] != first["steps"][-1]
    if "optimizer" in keys:  # nothing is left to merge but norms
        assert (tmp_path / "run" / "weights" / "best_deploy.pt").exists()
    else:
        check_run(tmp_path / "run", epochs=2, layers=layers)
    text = (tmp_path / "log1.txt").read_text()
    assert "best_deploy.pt" not in text, "only one process writes"


def test_compiled_training(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    compiled = []
    model = YOLO(str(model_yaml(tmp_path)))
    model.add_callback("on_train_start", lambda run: compiled.append(type(run.model).__name__))
    model.train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, epochs=1, compile=True))
    assert compiled == ["OptimizedModule"]
    check_run(tmp_path / "run", epochs=1)


def test_plots_are_drawn_each_validation(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    if ultralytics.__version__.startswith("8.3."):
        pytest.importorskip("scipy", reason="ultralytics 8.3 draws its own plots with it")
    drawn: list[bool] = []
    model = YOLO(str(model_yaml(tmp_path)))
    model.add_callback("on_fit_epoch_end", lambda run: drawn.append((run.save_dir / "branches.png").exists()))
    model.train(trainer=RepTrainer, **train_args(tiny_data, tmp_path, plots=True))
    assert drawn and all(drawn)
    assert cv2.imread(str(tmp_path / "run" / "branches.png")).shape[2] == 3
    check_run(tmp_path / "run", epochs=2)

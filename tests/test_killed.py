"""A run that is killed leaves the old artefacts or the new ones, each whole; and what cannot be written changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fuse_export import saved
from ultralytics import YOLO

from rep_backbones.yolo.fuse_export_cli import main

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("runs", [10, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_any_moment(runs: int, tmp_path: Path) -> None:
    older = saved(tmp_path)
    assert main([str(older), "--format", "onnx", "--out", str(tmp_path / "old")]) == 0
    changed = YOLO(str(older))
    for parameter in changed.model.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    changed.save(older)  # under the name of the old one, so that its artefacts replace those
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(older), str(runs), "0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["killed"] > found["runs"] // 2, "most are killed before they are done"
    assert found["last"] == 0 and found["left"] == [], "the next run clears up behind the killed ones"


def test_a_place_that_cannot_be_written_for_root_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    for target in ("/proc/fuse_export", "/dev/null/out"):
        assert main([str(weights), "--out", target]) == 2
        message = capsys.readouterr().err
        assert target in message and "folder that can be written to" in message and "Traceback" not in message
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".yaml"} == {"best.pt"}

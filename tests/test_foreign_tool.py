"""fuse_export on a variant whose own layers have no rule, and the table of docs/foreign.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import invalid
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import RepConv
from yolo_helpers import randomize_norms

from rep_backbones.registry import LAYERS
from rep_backbones.yolo import foreign_table, pages, user_code
from rep_backbones.yolo.deploy import what_it_needs
from rep_backbones.yolo.foreign_table import SUBJECTS, TOOL, Subject, measure
from rep_backbones.yolo.fuse_export_cli import main

CODE = """
import torch
from torch import nn
from rep_backbones import register_layer


@register_layer
class Theirs(nn.Module):
    def __init__(self, c1, c2, k=3, s=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(c1, c2, k, s, k // 2, bias=False), nn.Conv2d(c1, c2, 1, s)
        self.norm = nn.BatchNorm2d(c2)

    def forward(self, x):
        y = self.norm(self.a(x))
        y += self.b(x)
        return torch.relu(y)


@register_layer
class Gated(nn.Module):
    def __init__(self, c1, c2):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(c1, c2, 3, 1, 1), nn.Conv2d(c1, c2, 1), nn.Conv2d(c2, c2, 1)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + self.b(x))
"""
YAML = """nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Theirs, [16, 3, 2]]
  - [-1, 2, Theirs, [32, 3, 2]]
  - [-1, 1, {last}, [32]]
head:
  - [[2, 3], 1, Detect, [nc]]
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    layers, path = dict(LAYERS), list(sys.path)
    yield
    LAYERS.clear()
    LAYERS.update(layers)
    sys.modules.pop("my_blocks", None)
    sys.path[:] = path


def exported(folder: Path, last: str, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the report of fuse_export on a variant whose last row is `last`."""
    (folder / "my_blocks.py").write_text(CODE)
    (folder / "mine.yaml").write_text(YAML.replace("{last}", last))
    user_code.load([folder / "my_blocks.py"])
    torch.manual_seed(0)
    model: Any = YOLO(str(folder / "mine.yaml"))
    randomize_norms(model.model)
    model.model.args = model.ckpt = {"imgsz": 64}
    model.save(folder / "best.pt")
    words = ["--imgsz", "64", "--format", "onnx", "--no-latency", "--import", str(folder / "my_blocks.py"), *options]
    status = main([str(folder / "best.pt"), *words])
    report = folder / "best_deploy_report.json"
    return status, json.loads(report.read_text()) if report.exists() else {}


WITHOUT_THEIR_CODE = """
import sys, torch
from ultralytics import YOLO
model = YOLO(sys.argv[1]).model.eval()
assert "my_blocks" not in sys.modules and "rep_backbones" not in sys.modules
print(sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()), model(torch.rand(1, 3, 64, 64))[0].shape[0])
"""


def test_a_variant_is_deployed_without_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = exported(tmp_path, "Theirs")
    assert status == 0 and invalid(report) == []
    found = report["foreign"]
    assert [f["outcome"] for f in found] == ["merged"] * 4 and {f["type"] for f in found} == {"Theirs"}
    assert all(f["error"] < 1e-12 and f["gained"] == "4 steps -> 1, 10% fewer FLOPs" for f in found)
    counts, graph = report["counts"], report["artifacts"]["onnx"]
    assert counts["before"]["convs"] - counts["after"]["convs"] == 4 and graph["proved"]
    assert "measured 4 layers without a rule: 4 merged, 8 -> 4 convolutions; 0 left" in capsys.readouterr().out
    assert "10% fewer FLOPs" in (tmp_path / "best_deploy_report.html").read_text()
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", WITHOUT_THEIR_CODE, str(tmp_path / "best_deploy.pt")]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [str(counts["after"]["convs"]), "1"]


def test_what_is_left_is_told_with_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = exported(tmp_path, "Gated")
    assert status == 0
    left = [f for f in report["foreign"] if f["outcome"] == "left"]
    assert [(f["path"], f["type"]) for f in left] == [("model.3", "Gated")] and "relu" in left[0]["reason"]
    assert any("my_blocks.Gated" in note and "--import" in note for note in report["notes"])
    capsys.readouterr()
    assert exported(tmp_path, "Gated", "--foreign", "refuse")[0] == 2
    said = capsys.readouterr().err
    assert "my_blocks.Theirs holds 2 convolutions and has no rule; so do" in said and "Gated" in said


def test_a_forward_that_was_written_anew_is_told() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    notes = what_it_needs(nn.Sequential(nn.Conv2d(1, 1, 1), traced))
    assert len(notes) == 1 and "1 merged within a forward" in notes[0] and "restricted loading" in notes[0]
    assert what_it_needs(nn.Sequential(nn.Conv2d(1, 1, 1))) == []


def test_a_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(lambda: RepConv(4, 4, bn=True), (1, 4, 9, 9), foreign_table._stock_fuse)
    row = measure(subject)
    assert (row.merged, row.left, row.convs) == (1, 0, (2, 1, 1))
    assert 0 < row.exact < 1e-12 and 0 < row.outputs < 1e-5 and row.seconds > 0
    monkeypatch.setattr(foreign_table, "fuse_measured", lambda model, x: (nn.Conv2d(4, 4, 3, padding=1), []))
    assert measure(subject).outputs > 0.1, "a wrong one shows"


def test_the_page_holds_every_model_at_least_as_fused_as_by_its_own_code() -> None:
    text = pages.part(Path(__file__).parent.parent / "docs" / "foreign.md", TOOL)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if re.match(r"\| (timm|Ultr|y|r)", line)
    ]
    assert [row[0] for row in rows] == list(SUBJECTS)
    assert all(int(row[5]) <= int(row[6]) and float(row[7]) < 1e-10 and float(row[8]) < 1e-3 for row in rows)

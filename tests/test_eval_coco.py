"""tools/eval_coco.py: artefacts side by side on the same pictures, in COCO's numbers; detections that COCO's tools read."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_int8 import data, named_model  # noqa: F401

from rep_backbones.yolo.coco_ap import AP
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.eval_coco import main, table
from rep_backbones.yolo.fuse_export import run


def test_a_table_of_every_form(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    weights = named_model(tmp_path)
    run(weights, formats=("onnx",))
    paths = [str(tmp_path / name) for name in ("best.pt", "best_deploy.pt", "best_deploy.onnx")]
    assert main([*paths, "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "4 pictures of data, 64 x 64 pixels" in told
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("| best")]
    assert [row[0] for row in rows] == ["best.pt", "best_deploy.pt", "best_deploy.onnx"]
    assert rows[0][-1] == "" and all(abs(float(row[-1])) <= 0.1 for row in rows[1:]), "all compute the same"
    assert (tmp_path / "out" / "ap.md").read_text() in told
    found = open_data(data).truth.loadRes(str(tmp_path / "out" / "best_deploy.onnx.detections.json"))
    assert {a["image_id"] for a in found.dataset["annotations"]} <= {1, 2, 3, 4} and len(found.dataset["annotations"]) > 10


def test_differences_are_to_the_first_row() -> None:
    text = table({"a": AP(0.5, 0.7, 0.6, None, 0.4, 0.6), "b": AP(0.49, 0.7, 0.6, None, 0.4, 0.6)})
    assert text.splitlines()[2:] == [
        "| a | 50.00 | 70.00 | 60.00 |  | 40.00 | 60.00 |  |",
        "| b | 49.00 | 70.00 | 60.00 |  | 40.00 | 60.00 | -1.00 |",
    ]


def test_bad_input(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for arguments, said in (
        ([str(tmp_path / "no.pt"), "--data", str(data)], "does not exist"),
        ([str(tmp_path / "no.onnx"), "--data", str(data)], "does not exist"),
        ([str(data), "--data", str(data)], "cannot be run; accepted are names that end with .pt"),
        ([str(tmp_path / "no.pt"), "--data", "nowhere.yaml"], "nothing is downloaded"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1

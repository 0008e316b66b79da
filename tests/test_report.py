"""What fuse_export writes: its JSON against the schema, its HTML for every task, and after failures."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from report_helpers import SCHEMA, full, invalid
from test_fuse_export import saved
from torch import nn
from ultralytics.engine.exporter import Exporter

from rep_backbones.export.html import commands
from rep_backbones.fuse import Fused
from rep_backbones.fuse import report as fuse_report
from rep_backbones.yolo import fuse_export, fuse_export_cli, report_page
from rep_backbones.yolo.fuse_export_cli import main
from rep_backbones.yolo.pictures import SHIPPED

ROOT = Path(__file__).parent.parent


def made(folder: Path) -> tuple[dict[str, Any], str]:
    """The report, valid, and the page."""
    report = json.loads((folder / "best_deploy_report.json").read_text())
    assert invalid(report) == []
    return report, (folder / "best_deploy_report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "extra"),
        ({"status": 2}, "status"),
        ({"layers": [{"path": "model.1"}]}, "layers[0]"),
        ({"source": {}}, "source"),
        ({"artifacts": {"onnx": {}}}, "artifacts.onnx"),
        ({"trained": {"ap": {"ap": 1.5}}}, "trained.ap"),
    ],
)
def test_the_schema_refuses(change: dict[str, Any], said: str) -> None:
    errors = invalid({**full(), **change})
    assert errors and said in " ".join(errors)


def test_the_page_of_the_schema_names_every_field() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    schema = json.loads(SCHEMA.read_text())
    parts = [schema, schema["properties"]["source"], schema["properties"]["settings"], *schema["$defs"].values()]
    names = {name for part in parts for name in part.get("properties", {})}
    assert len(names) > 60
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_every_task(tmp_path: Path, task: str) -> None:
    assert main([str(saved(tmp_path, task, loud=task != "classify")), "--format", "onnx"]) == 0
    report, text = made(tmp_path)
    assert report["notes"] == [], "every picture could be drawn"
    for layer in report["layers"]:
        assert list(layer["shares"]) == layer["branches"] and sum(layer["shares"].values()) == pytest.approx(1)
    assert [f"<figcaption>{name}" in text for name in ("bus.jpg", "zidane.jpg")] == [True, True]
    first, second = text.count('class="found first"'), text.count('class="found second"')
    if task == "classify":
        assert first == second == 0 and text.count('<table class="top5">') == 2
    else:
        assert first == second > 0
    assert "RepVGGBlock at model.1" in text and "RepConv at model.2.1" in text, "the widest of each type"
    assert text.count('class="row merged"') == 3


@pytest.mark.parametrize("options", [["--batch", "2"], ["--nms"], ["--half"], ["--imgsz", "64", "96"]], ids=" ".join)
def test_options(tmp_path: Path, options: list[str]) -> None:
    assert main([str(saved(tmp_path, loud=True)), "--format", "onnx", *options]) == 0
    report, text = made(tmp_path)
    assert not [note for note in report["notes"] if "HTML" in note]
    first, second = text.count('class="found first"'), text.count('class="found second"')
    assert abs(first - second) <= 4 * ("--half" in options) and first > 0, "FP16 rounds scores over the threshold"
    assert " ".join(options) in text


def test_no_branches(tmp_path: Path) -> None:
    assert main([str(saved(tmp_path, rows="Conv")), "--format", "onnx"]) == 0
    report, text = made(tmp_path)
    assert report["layers"] == [] and "No multi-branch layer was merged" in text and 'class="row merged"' not in text


def test_a_missing_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(saved(tmp_path)), "--format", "engine"]) == 4
    assert "Proved, but not complete" in made(tmp_path)[1]


def test_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path)

    def wrong(model: nn.Module, **options: Any) -> Fused:
        found = fuse_report(model, **options)
        for path in found.places.values():
            conv: Any = found.model.get_submodule(path)
            with torch.no_grad():
                conv.bias[0] = float("nan")
        return found

    monkeypatch.setattr(fuse_export, "fuse_report", wrong)
    assert main([str(weights), "--format", "onnx"]) == 3
    report, text = made(tmp_path)
    assert report["layers"][0]["error"] is None and report["artifacts"]["pt"]["proved"] is False
    assert "Not proved" in text and "best_deploy.unproved.pt" in text and "4 off" in text


def test_an_exporter_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Exporter, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not <today>")

    monkeypatch.setattr(Exporter, "export_onnx", failing)
    assert main([str(saved(tmp_path)), "--format", "onnx"]) == 3
    assert "not &lt;today&gt;" in made(tmp_path)[1]


def test_a_picture_that_cannot_be_drawn_costs_no_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "layers", failing)
    assert main([str(saved(tmp_path)), "--format", "onnx"]) == 0
    report, text = made(tmp_path)
    assert report["notes"] == ["the HTML report lacks the layers (RuntimeError: no ink)"] and "no ink" in text
    assert report["artifacts"]["onnx"]["proved"]


@pytest.mark.parametrize("batch", ["1", "3"])
def test_the_pictures_show_what_the_proof_saw(batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artefact is not run a second time for them."""
    monkeypatch.setattr(report_page.backends, "runner", None)
    assert main([str(saved(tmp_path)), "--format", "onnx", "--batch", batch, "--no-latency"]) == 0
    found, text = made(tmp_path)
    assert found["notes"] == [] and all(path.name in text for path in SHIPPED)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--no-latency", "--nms", "--imgsz", "64", "96", "--format", "torchscript", "onnx"],
        [
            "--import",
            "my_layers.py",
            "--import",
            "my_package.blocks",
            "--int8",
            "--int8-max-drop",
            "0.5",
            "--data",
            "d.yaml",
        ],
        ["--batch", "2", "--dynamic", "--half", "--device", "cpu"],
    ],
    ids=" ".join,
)
def test_the_command_makes_the_same_again(options: list[str], tmp_path: Path) -> None:
    given = fuse_export_cli._settings(fuse_export_cli._parser().parse_args(["best.pt", *options]))
    made = fuse_export._plain(given, (64, 96), list(given.formats) or ["onnx"])
    command = commands({**full(), "settings": made})[0][1]
    again = fuse_export_cli._settings(fuse_export_cli._parser().parse_args(split(command)[2:]))
    assert fuse_export._plain(again, (64, 96), again.formats) == made and again.imgsz == (64, 96)


def test_check_of_a_real_run(tmp_path: Path) -> None:
    assert main([str(saved(tmp_path)), "--format", "onnx"]) == 0
    assert main(["--check", str(tmp_path / "best_deploy_report.json")]) == 0
    graph = bytearray((tmp_path / "best_deploy.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (tmp_path / "best_deploy.onnx").write_bytes(graph)
    assert main(["--check", str(tmp_path / "best_deploy_report.json")]) == 3

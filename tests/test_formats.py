"""`--format`: each file is run and compared, a wrong one is seen; what is missing is told, and nothing is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fuse_export import ROOT, files, report, saved
from ultralytics import YOLO
from ultralytics.engine.exporter import Exporter
from ultralytics.utils import ASSETS
from yolo_helpers import spoiling

from rep_backbones.export.report import sha256
from rep_backbones.yolo import artifacts, formats, timing
from rep_backbones.yolo.fuse_export import Settings
from rep_backbones.yolo.fuse_export_cli import main
from rep_backbones.yolo.switches import jit_unwarned

REPORTS = ("best_deploy_report.json", "best_deploy_report.html")
ENDINGS = {"torchscript": ".torchscript", "openvino": "_openvino_model", "ncnn": "_ncnn_model"}
LACKING = [name for name in ENDINGS if not all(map(importlib.util.find_spec, formats.NEEDS[name].modules))]
HERE = [name for name in ENDINGS if name not in LACKING]
each = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skipif(name in LACKING, reason=f"{name} is not installed")) for name in ENDINGS],
)


def test_files_and_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--format", *HERE]) == 0
    written = {f"best_deploy{ENDINGS[name]}" for name in HERE}
    assert files(tmp_path) == {"best.pt", "best_deploy.pt", *REPORTS, *written}
    for name in HERE:
        made, path = report(weights)["artifacts"][name], tmp_path / f"best_deploy{ENDINGS[name]}"
        assert made["path"] == path.name and made["proved"] is True and made["precision"] == "fp32"
        assert {output["name"] for output in made["outputs"]} == {"boxes", "scores"}
        assert made["error"] <= artifacts.TOLERANCES[name] and made["sha256"] == sha256(path)
        assert made["bytes"] > 500_000, "31 convolutions"
    said = capfd.readouterr()
    assert "all proved (exit status 0)" in said.out
    assert "pnnx" not in said.out + said.err and "deprecated" not in said.err


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_every_task(tmp_path: Path, task: str) -> None:
    weights = saved(tmp_path, task)
    assert main([str(weights), "--format", *HERE, "--no-latency"]) == 0
    assert all(report(weights)["artifacts"][name]["proved"] for name in HERE)


@each
@pytest.mark.parametrize("options", [["--batch", "2"], ["--half"], ["--nms"], ["--dynamic", "--batch", "2"]], ids=" ".join)
def test_every_option(tmp_path: Path, name: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path, loud=True)
    status = main([str(weights), "--format", name, *options, "--no-latency"])
    if name == "ncnn" and options[0] in ("--nms", "--dynamic"):
        assert status == 2 and files(tmp_path) == {"best.pt"}
        assert f"{options[0]} is not made for --format ncnn; accepted with it are onnx, " in capsys.readouterr().err
        return
    assert status == 0
    made = report(weights)["artifacts"][name]
    assert made["precision"] == ("fp16" if "--half" in options and name != "torchscript" else "fp32")
    if options == ["--half"] and name == "torchscript":
        assert "best_deploy.torchscript is FP32" in report(weights)["notes"][0]
    elif options == ["--half"]:
        assert made["bytes"] < 500_000 and made["error"] > 1e-5


@each
def test_artefacts_serve_the_stock_commands(tmp_path: Path, name: str) -> None:
    assert main([str(saved(tmp_path, loud=True)), "--format", name, "--no-latency"]) == 0
    paths = [tmp_path / f"best_deploy{end}" for end in (".pt", ENDINGS[name])]
    with jit_unwarned():
        deploy, exported = (
            YOLO(str(path), task="detect").predict(ASSETS / "bus.jpg", imgsz=64, rect=False, verbose=False)[0].boxes.data
            for path in paths
        )
    assert len(deploy) and deploy.shape == exported.shape
    assert torch.allclose(deploy, exported, rtol=0, atol=0.05), "pixels of a picture 1080 high"


# ---- proofs, seen failing ------------------------------------------------------------------------------------------------


def spoil_torchscript(path: Path) -> None:
    extra = {"config.txt": ""}
    with jit_unwarned():
        script = torch.jit.load(str(path), _extra_files=extra)
        with torch.no_grad():
            next(value for value in script.parameters() if value.ndim == 4).mul_(1.05)
        torch.jit.save(script, str(path), _extra_files=extra)


def spoil_weights(path: Path) -> None:
    """One weight in a hundred of the first kernels is changed."""
    file = next(path.glob("*.bin"))
    values = np.fromfile(file, np.float32)
    values[100:2000:100] += 0.5
    values.tofile(file)


@each
def test_a_wrong_weight_is_not_proved(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path, loud=True)
    before = tmp_path / f"best_deploy{ENDINGS[name]}"
    before.write_text("the one before")
    spoiling(monkeypatch, name, spoil_torchscript if name == "torchscript" else spoil_weights)
    assert main([str(weights), "--format", name]) == 3
    assert before.read_text() == "the one before"
    unproved = f"best_deploy.unproved{ENDINGS[name]}"
    assert (tmp_path / unproved).exists() and (tmp_path / "best_deploy.pt").exists()
    assert f"{before.name} computes something else" in report(weights)["failures"][0]
    made = report(weights)["artifacts"][name]
    assert made["proved"] is False and made["path"] == unproved and "latency" not in made


@each
def test_a_file_that_does_not_run_is_not_proved(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(path: Path) -> None:
        graphs = [path] if path.is_file() else [*path.glob("*.xml"), *path.glob("*.param")]
        for graph in graphs:
            graph.write_bytes(graph.read_bytes()[:200])

    weights = saved(tmp_path)
    spoiling(monkeypatch, name, cut)
    assert main([str(weights), "--format", name]) == 3
    assert f"best_deploy{ENDINGS[name]} cannot be run" in report(weights)["failures"][0]
    assert report(weights)["artifacts"][name]["proved"] is False and "Traceback" not in capsys.readouterr().err


def test_folders_replace_folders(tmp_path: Path) -> None:
    if "openvino" in LACKING:
        pytest.skip("openvino is not installed")
    weights = saved(tmp_path)
    old = tmp_path / "best_deploy_openvino_model" / "old.bin"
    old.parent.mkdir()
    old.write_text("of the run before")
    assert main([str(weights), "--format", "openvino", "--no-latency"]) == 0
    assert not old.exists() and sha256(old.parent) == report(weights)["artifacts"]["openvino"]["sha256"]


def test_a_path_in_which_the_ending_of_the_checkpoint_occurs(tmp_path: Path) -> None:
    if "openvino" in LACKING:
        pytest.skip("openvino is not installed")
    out = tmp_path / "run.pt.5"
    assert main([str(saved(tmp_path)), "--format", "openvino", "torchscript", "--out", str(out), "--no-latency"]) == 0
    made = {"best_deploy.torchscript", "best_deploy_openvino_model"}
    assert files(out) == {"best_deploy.pt", *REPORTS, *made}
    assert files(tmp_path) == {"best.pt", out.name}, "nothing beside the folder"


# ---- what is not here ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that were to be started; none is, and Ultralytics may look for packages."""
    started: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        started.append(args)
        raise OSError("no programs in this test")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.delenv("ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS")
    return started


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [
        ("openvino", "openvino", "the Python package is not installed: openvino (pip install openvino)"),
        ("ncnn", "pnnx", "pnnx (pip install ncnn pnnx==20260526)"),
        ("coreml", "coremltools", "(pip install coremltools)"),
        ("executorch", "executorch", "(pip install executorch)"),
        ("mnn", "", "its converter runs pip when it is imported"),
        ("imx", "", "run yolo export model=<stem>_deploy.pt format=imx yourself"),
    ],
)
def test_a_package_that_is_missing(
    tmp_path: Path,
    name: str,
    module: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    started: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "torchscript", name]) == 4
    assert said in report(weights)["failures"][0] and said in report(weights)["artifacts"][name]["missing"]
    assert said in capsys.readouterr().out
    assert files(tmp_path) == {"best.pt", "best_deploy.pt", "best_deploy.torchscript", *REPORTS}
    assert not [command for command in started if "install" in str(command)], "by pip, uv or apt"


REPORTS_NOTHING = """
import sys
from rep_backbones.yolo.fuse_export import Settings
from rep_backbones.yolo.fuse_export_cli import main
status = main([sys.argv[1], "--format", "openvino", "--no-latency"])
sys.exit(status or ("openvino_telemetry" in sys.modules))
"""


@pytest.mark.skipif("openvino" in LACKING, reason="openvino is not installed")
def test_openvino_does_not_report_its_use(tmp_path: Path) -> None:
    """It keeps a number for the user in the home folder from its import on, and sends it."""
    (tmp_path / "home").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", REPORTS_NOTHING, str(saved(tmp_path))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "best_deploy_openvino_model").exists() and not (tmp_path / "home" / "intel").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x2paddle").mkdir()
    (tmp_path / "paddle").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed: paddle, x2paddle" in formats.missing("paddle")


def test_a_format_that_is_new_to_us_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"Argument": ["-", "onnx", "newest"], "Suffix": [".pt", ".onnx", ".new"], "Arguments": [[], [], []]}
    monkeypatch.setattr(formats, "export_formats", lambda: known)
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "newest"]) == 4
    assert "what it would install or download is not known" in report(weights)["failures"][0]


def test_what_is_not_run_keeps_its_name_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(self: Exporter) -> Path:
        made = self.file.with_suffix(".mlpackage")
        (made / "Data").mkdir(parents=True)
        (made / "Data" / "weights.bin").write_bytes(b"1234")
        return made

    monkeypatch.setattr(Exporter, "export_coreml", export)
    monkeypatch.setattr(formats, "_installed", lambda module: True)
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "coreml"]) == 0
    made = report(weights)["artifacts"]["coreml"]
    assert made["path"] == "best_deploy.mlpackage" and made["proved"] is None and made["bytes"] == 4
    assert made["note"].startswith("not run: ") and made["note"] in report(weights)["notes"]
    assert made["sha256"] == sha256(tmp_path / "best_deploy.mlpackage") and "latency" not in made
    assert "all that can be run here is proved; NOT RUN: coreml (exit status 0)" in capsys.readouterr().out


def test_list_of_formats(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(formats, "_installed", lambda module: module not in ("openvino", "x2paddle"))
    assert main(["--list-formats"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["onnx"].split() == ["onnx", "<stem>_deploy.onnx", "proved"]
    assert lines["ncnn"].split() == ["ncnn", "<stem>_deploy_ncnn_model/", "proved"]
    assert lines["openvino"].endswith("missing: the Python package is not installed: openvino (pip install openvino)")
    assert lines["paddle"].endswith(
        "missing: the Python package is not installed: x2paddle (pip install paddlepaddle x2paddle)"
    )
    assert "not run: made by Ultralytics" in lines["coreml"] and "not made: its converter runs pip" in lines["mnn"]
    assert set(formats.names()) <= lines.keys()


def test_weights_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "the weights are missing" in capsys.readouterr().err


# ---- latency -------------------------------------------------------------------------------------------------------------


def test_latency_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "onnx", *HERE, "--batch", "2"]) == 0
    found = report(weights)
    measured = {"trained": found["trained"], **found["artifacts"]}
    assert measured.keys() == {"trained", "pt", "onnx", *HERE}
    for name, about in measured.items():
        latency = about["latency"]
        static = name in ("onnx", "torchscript", "openvino")
        assert latency["device"] and latency["batches"].keys() == ({"2"} if static else {"1", "2"})
        for taken in latency["batches"].values():
            assert 0 < taken["low_ms"] <= taken["median_ms"] <= taken["high_ms"] and 3 <= taken["runs"] <= 10
    said = capsys.readouterr().out
    assert "latency at batch 1: multi-branch " in said and "latency at batch 2: multi-branch " in said and ", fused " in said


def test_dynamic_artefacts_are_timed_at_both(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "onnx", "torchscript", "--batch", "2", "--dynamic"]) == 0
    made = report(weights)["artifacts"]
    assert all(made[name]["latency"]["batches"].keys() == {"1", "2"} for name in ("onnx", "torchscript"))


def test_no_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--no-latency"]) == 0
    assert all("latency" not in about for about in report(weights)["artifacts"].values())
    assert "latency at batch" not in capsys.readouterr().out
    assert report(weights)["trained"] == {}


def test_what_is_proved_is_not_lost_with_the_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("too many pictures")

    monkeypatch.setattr(timing, "measure", failing)
    weights = saved(tmp_path)
    assert main([str(weights)]) == 0
    assert "the latency is not measured to its end (MemoryError: too many pictures)" in report(weights)["notes"]
    assert report(weights)["artifacts"]["onnx"]["proved"]


def test_pytorch_keeps_its_threads(tmp_path: Path) -> None:
    """Choosing a device, Ultralytics sets their number; what is timed and compared after an export was slow for it."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert main([str(saved(tmp_path)), "--no-latency"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_every_picture_is_compared(tmp_path: Path, batch: int) -> None:
    """In batches of the size that the artefact is made for."""
    pictures = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    job = artifacts.Job(tmp_path, tmp_path, None, pictures, Settings(batch=batch), (64, 64))
    given = list(artifacts._batches(job))
    assert {len(x) for x in given} == {batch} and torch.cat(given)[:, 0, 0, 0].tolist()[:3] == [0, 1, 2]
    assert len(given) == -(-3 // batch)


def test_the_deploy_model_is_asked_once_for_all_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stock = artifacts.exported_form
    monkeypatch.setattr(artifacts, "exported_form", lambda *a, **k: (asked.append(a), stock(*a, **k))[1])
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "onnx", "torchscript", "--no-latency"]) == 0
    assert len(asked) == 1
    assert all(report(weights)["artifacts"][name]["proved"] for name in ("onnx", "torchscript"))


def test_a_model_that_fails_to_answer_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread beside the export nobody hears it."""

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no answer")

    monkeypatch.setattr(artifacts, "exported_form", fails)
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "onnx", "--no-latency"]) == 3
    assert "no answer" in report(weights)["failures"][0]

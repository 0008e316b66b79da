"""tools/fuse_export.py: its files, exit statuses and report; each proof seen failing; nothing lost of what was there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.exporter import Exporter
from ultralytics.utils import ASSETS
from yolo_helpers import built, model_yaml, narrow, randomize_norms, spoiling

import rep_backbones.yolo.fuse_export as fuse_export
from rep_backbones import fuse
from rep_backbones.affine import AffineConv
from rep_backbones.containers import Scale
from rep_backbones.export import tensorrt
from rep_backbones.export.onnx_model import OnnxModel
from rep_backbones.rules import multi_branch
from rep_backbones.yolo.fuse_export_cli import main

ROOT = Path(__file__).parent.parent
FAMILIES = {"cspdarknet-weighted", "efficientrep", "efficientrep-qa", "mobileone", "repvgg", "yolo11-repconv"}
MODELS = [  # each takes seconds; the others are of the same operators
    pytest.param(path.stem, marks=() if path.stem in FAMILIES else pytest.mark.slow)
    for path in sorted((ROOT / "cfg").glob("*.yaml"))
]


def saved(folder: Path, task: str = "detect", rows: str = "mixed", name: str = "best.pt", loud: bool = False) -> Path:
    """A checkpoint of a small model with random statistics, for 64 pixels; `loud` gives it scores that NMS keeps."""
    torch.manual_seed(0)
    model = YOLO(str(model_yaml(folder, rows, task)), task=task)
    randomize_norms(model.model)
    if loud:
        for branch in [*model.model.model[-1].cv2, *model.model.model[-1].cv3]:
            nn.init.normal_(branch[-1].weight, 0, 0.3)
            nn.init.zeros_(branch[-1].bias)
    model.model.args = {"imgsz": 64}
    model.ckpt = {"train_args": {"imgsz": 64}}
    model.save(folder / name)
    return folder / name


def report(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.stem}_deploy_report.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".yaml"}


def test_files_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights)]) == 0
    assert files(tmp_path) == {
        "best.pt",
        "best_deploy.pt",
        "best_deploy.onnx",
        "best_deploy_report.json",
        "best_deploy_report.html",
    }
    found = report(weights)
    assert found["schema"] == "rep_backbones/fuse_export/1" and found["status"] == 0 and found["failures"] == []
    assert found["settings"]["imgsz"] == [64, 64], "as trained"
    assert found["counts"]["before"]["multi_branch_layers"] == 4 and found["counts"]["after"]["multi_branch_layers"] == 0
    assert [layer["path"] for layer in found["layers"]] == ["model.1", "model.2.0", "model.2.1", "model.3"]
    assert all(layer["ok"] and layer["error"] <= 1e-5 and layer["kernel"] == [3, 3] for layer in found["layers"])
    assert {"boxes", "scores"} <= {output["name"] for output in found["proofs"]["fuse"]["outputs"]}
    made = found["artifacts"]["onnx"]
    assert made["proved"] and made["conv_nodes"] == made["conv_modules"] == found["counts"]["after"]["convs"]
    assert made["unknown_to_tensorrt"] == []
    for name in ("pt", "onnx"):
        assert len(found["artifacts"][name]["sha256"]) == 64
    assert {"rep_backbones", "torch", "ultralytics", "onnx", "onnxruntime"} <= found["versions"].keys()
    assert "all proved (exit status 0)" in capsys.readouterr().out


def test_artefacts_serve_the_stock_commands(tmp_path: Path) -> None:
    weights = saved(tmp_path, loud=True)
    assert main([str(weights)]) == 0
    deploy, exported = (YOLO(str(tmp_path / f"best_deploy.{end}"), task="detect") for end in ("pt", "onnx"))
    assert multi_branch(deploy.model) == []
    assert next(deploy.model.parameters()).dtype == torch.float32
    boxes = [m.predict(ASSETS / "bus.jpg", imgsz=64, rect=False, verbose=False)[0].boxes.data for m in (deploy, exported)]
    assert len(boxes[0]) and boxes[0].shape == boxes[1].shape
    assert torch.allclose(boxes[0], boxes[1], rtol=0, atol=0.05), "pixels of a picture 1080 high"
    assert exported.names == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("segment", ["--nms"]),
        ("pose", ["--nms"]),
        ("obb", ["--nms"]),
        ("classify", ["--half"]),
        ("detect", ["--dynamic", "--batch", "2"]),
        ("detect", ["--half"]),
        ("detect", ["--nms"]),
        ("detect", ["--imgsz", "64", "96"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "-",
)
def test_every_task_and_option(tmp_path: Path, task: str, options: list[str]) -> None:
    weights = saved(tmp_path, task, loud=task != "classify")
    assert main([str(weights), *options]) == 0
    found = report(weights)
    assert found["artifacts"]["onnx"]["proved"]
    assert not any("prove little" in note for note in found["notes"])
    graph = OnnxModel(tmp_path / "best_deploy.onnx")
    assert graph.half == ("--half" in options)
    if "--nms" in options:
        assert found["artifacts"]["onnx"]["outputs"][0]["name"] == "boxes"
        rest = {"segment": 4, "pose": 3, "obb": 1}.get(task, 0)  # mask coefficients, a point with its score, an angle
        assert graph(torch.rand(1, 3, 64, 64))[0].shape[2] == 6 + rest
    if "--dynamic" in options:
        assert [len(graph(torch.rand(n, 3, 96, 64))[0]) for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_use_operators_of_tensorrt(name: str, tmp_path: Path) -> None:
    model = randomize_norms(narrow(f"{name}.yaml"))
    torch.save({"model": model, "train_args": {"task": model.task}}, tmp_path / "best.pt")
    assert main([str(tmp_path / "best.pt"), "--imgsz", "64", "--no-latency"]) == 0
    graph = OnnxModel(tmp_path / "best_deploy.onnx")
    assert tensorrt.unsupported(graph.operators) == []
    scales = sum(isinstance(module, Scale) for module in fuse(model.eval()).modules())
    assert graph.operators["BatchNormalization"] == scales, "the learned alpha of a shortcut, and no norm"


def test_engine_without_a_gpu_keeps_onnx_and_gives_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)
    weights = saved(tmp_path)
    out = tmp_path / "a folder"
    assert main([str(weights), "--format", "engine", "--dynamic", "--half", "--batch", "4", "--out", str(out)]) == 4
    assert files(out) == {"best_deploy.pt", "best_deploy.onnx", "best_deploy_report.json", "best_deploy_report.html"}
    line = json.loads((out / "best_deploy_report.json").read_text())["artifacts"]["engine"]["trtexec"]
    assert line == (
        f"trtexec --onnx='{out}/best_deploy.onnx' --saveEngine='{out}/best_deploy.engine' --minShapes=images:1x3x16x16 "
        "--optShapes=images:4x3x64x64 --maxShapes=images:4x3x64x64 --fp16"
    )
    assert line in capsys.readouterr().out


def test_engine_that_fails_to_build_keeps_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "missing", lambda: "")
    monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)  # so that Ultralytics refuses device 0
    weights = saved(tmp_path)
    assert main([str(weights)]) == 4, "asked for by default where CUDA and TensorRT are"
    assert report(weights)["artifacts"]["onnx"]["proved"]
    assert "trtexec --onnx=" in report(weights)["failures"][0]


# ---- each proof, seen failing --------------------------------------------------------------------------------------------


def test_wrong_kernel_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path)
    stock = AffineConv.to_conv

    def slightly_wrong(self: AffineConv, *dtype: Any) -> nn.Conv2d:
        conv = stock(self, *dtype)
        with torch.no_grad():
            conv.bias[0] += 1e-3
        return conv

    monkeypatch.setattr(AffineConv, "to_conv", slightly_wrong)
    assert main([str(weights)]) == 3
    assert files(tmp_path) == {"best.pt", "best_deploy.unproved.pt", "best_deploy_report.json", "best_deploy_report.html"}
    assert "layer model.1 (RepVGGBlock) is off by" in report(weights)["failures"][0]
    assert not report(weights)["artifacts"]["pt"]["proved"]


def test_wrong_graph_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path, loud=True)
    (tmp_path / "best_deploy.onnx").write_bytes(b"the one before")

    def spoil(path: Path) -> None:
        model = onnx.load(path)
        kernel = next(value for value in model.graph.initializer if len(value.dims) == 4)
        kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel) * 1.05, kernel.name))
        onnx.save(model, path)

    spoiling(monkeypatch, "onnx", spoil)
    assert main([str(weights)]) == 3
    assert (tmp_path / "best_deploy.onnx").read_bytes() == b"the one before"
    assert (tmp_path / "best_deploy.unproved.onnx").exists() and (tmp_path / "best_deploy.pt").exists()
    assert "best_deploy.onnx computes something else" in report(weights)["failures"][0]


def test_layers_that_are_left_are_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path)
    stock = fuse_export.save_deploy

    def unfused(model: nn.Module, target: Path, **kwargs: Any) -> None:
        stock(model, target, **kwargs)
        content = torch.load(target, weights_only=False)
        torch.save({**content, "model": model}, target)

    monkeypatch.setattr(fuse_export, "save_deploy", unfused)
    assert main([str(weights)]) == 3
    assert report(weights)["failures"] == ["4 multi-branch layers are left after fusing"]


@pytest.mark.parametrize("rows", ["RepConv", "RepVGGBlock", "Conv"])
def test_graph_of_an_unfused_model_shows_its_branches(rows: str, tmp_path: Path) -> None:
    model = built(tmp_path, rows)
    body = nn.Sequential(*[model.model[i] for i in range(4)]).eval()
    torch.onnx.export(body, (torch.rand(1, 3, 32, 32),), tmp_path / "body.onnx", dynamo=False)
    assert len(OnnxModel(tmp_path / "body.onnx").leftover_branches) == {"Conv": 0}.get(rows, 5), "one has three"


def test_residual_around_an_activation_is_no_leftover_branch(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), act, nn.Conv2d(4, 4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    found = []
    for act in (nn.SiLU(), nn.Identity()):
        torch.onnx.export(Residual(act).eval(), (torch.rand(1, 4, 8, 8),), tmp_path / "x.onnx", dynamo=False)
        found.append(len(OnnxModel(tmp_path / "x.onnx").leftover_branches))
    assert found == [0, 1]


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"PK\x03\x04 cut off", "damaged"),
        (b"\x80\x04 a pickle", "a bare pickle"),
    ],
    ids=["missing", "empty", "truncated", "pickle"],
)
def test_bad_checkpoint(tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "best.pt").write_bytes(content)
    assert main([str(tmp_path / "best.pt")]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message and message.count("cannot be read") == 0
    assert files(tmp_path) <= {"best.pt"}


def test_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    content = torch.load(weights, weights_only=False)
    layer = content["model"].model[1]
    next(m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)).running_var[0] = float("nan")
    torch.save(content, weights)
    assert main([str(weights)]) == 2
    message = capsys.readouterr().err
    assert "model.1" in message and "NaN or inf" in message
    assert files(tmp_path) == {"best.pt"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "tflight"], "accepted are onnx, engine"),
        (["--batch", "0"], "batch=0"),
        (["--imgsz", "0"], "imgsz=(0,)"),
        (["--imgsz", "1", "2", "3"], "imgsz=(1, 2, 3)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings(tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved(tmp_path)), *options]) == 2
    assert said in capsys.readouterr().err
    assert files(tmp_path) == {"best.pt"}


def test_target_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert main([str(weights), "--out", str(tmp_path / "taken" / "folder")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved(tmp_path)
    (tmp_path / "best_deploy.pt").write_bytes(b"the one before")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main([str(weights)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "best_deploy.pt").read_bytes() == b"the one before"
    assert files(tmp_path) == {"best.pt", "best_deploy.pt"}


def test_interrupt_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path)
    for name in ("best_deploy.onnx", "best_deploy.pt"):
        (tmp_path / name).write_bytes(b"the one before")

    def interrupted(self: Exporter, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exporter, "export_onnx", interrupted)
    assert main([str(weights)]) == 130
    assert files(tmp_path) == {"best.pt", "best_deploy.pt", "best_deploy.onnx"}
    assert all((tmp_path / name).read_bytes() == b"the one before" for name in ("best_deploy.onnx", "best_deploy.pt"))


@pytest.mark.parametrize("delay", [0.5, 3.0])
def test_interrupt_of_the_process(tmp_path: Path, delay: float) -> None:
    """While the libraries are loaded, too: no traceback."""
    weights = saved(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "fuse_export.py"), str(weights)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert files(tmp_path) == {"best.pt"}


LIMITED = """
import resource, sys
from rep_backbones.yolo.fuse_export_cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.exit(main([sys.argv[1]]))
"""


@pytest.mark.parametrize("size", [20_000, 150_000])
def test_files_that_do_not_fit(tmp_path: Path, size: int) -> None:
    """A real limit: torch.save and the exporter report a full disk each in its own way."""
    weights = saved(tmp_path)
    (tmp_path / "best_deploy.pt").write_bytes(b"the one before")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIMITED, str(weights), str(size)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr and "Free the space" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "best_deploy.pt").read_bytes() == b"the one before"
    assert files(tmp_path) == {"best.pt", "best_deploy.pt"}


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, used = tmp_path / f".fuse_export-{ended.pid}-abc", tmp_path / f".fuse_export-{os.getpid()}-abc"
    for folder in (left, used):
        folder.mkdir()
    assert main([str(weights), "--format", "onnx"]) == 0
    assert not left.exists() and used.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.-1.cv3.0.2.bias", float("nan"), "cv3.0.2.bias: 1 of"),
        ("model.-1.cv3.0.1.1.bn.running_var", -1.0, "cv3.0.1.1.bn: 1 of"),
    ],
)
def test_numbers_of_stock_layers_are_checked(
    tmp_path: Path, key: str, value: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = YOLO(str(model_yaml(tmp_path, "mixed")))
    key = key.replace("-1", str(len(model.model.model) - 1))
    model.model.state_dict()[key][0] = value
    model.save(tmp_path / "best.pt")
    assert main([str(tmp_path / "best.pt")]) == 2
    assert f"cannot be fused: model.{len(model.model.model) - 1}.{said}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    assert main([str(weights), "--format", "onnx", "--device", "0"]) == 4
    assert "no CUDA device here; all that a CPU can make is made on the CPU" in capsys.readouterr().out
    assert (tmp_path / "best_deploy.onnx").exists() and report(weights)["status"] == 4


def test_an_exporter_that_fails_leaves_what_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved(tmp_path)

    def failing(self: Exporter, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(Exporter, "export_onnx", failing)
    assert main([str(weights)]) == 3
    told = capsys.readouterr()
    assert "exporting to onnx failed (RuntimeError: not today)" in told.err and "what is there is proved" in told.out
    assert files(tmp_path) == {"best.pt", "best_deploy.pt", "best_deploy_report.json", "best_deploy_report.html"}


def test_model_without_branches_is_exported_with_a_note(tmp_path: Path) -> None:
    weights = saved(tmp_path, rows="Conv")
    assert main([str(weights)]) == 0
    assert "has no multi-branch layers" in report(weights)["notes"][0]


def test_deploy_checkpoint_can_be_exported_again(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    assert main([str(weights)]) == 0
    assert main([str(tmp_path / "best_deploy.pt"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "best_deploy_deploy.onnx").exists()


def test_script_from_another_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "tools" / "fuse_export.py"), "best.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "best_deploy.onnx").exists()

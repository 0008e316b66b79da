"""fuse_export --check: what is whole is told from what is damaged, lost, not proved, or not a report at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rep_backbones.export import check as checking
from rep_backbones.export.report import sha256
from rep_backbones.yolo.fuse_export_cli import main


def written(folder: Path, **changes: Any) -> Path:
    """A report of two proved files, whose artifacts get `changes` by format."""
    artifacts: dict[str, Any] = {}
    for name, ending in (("pt", ".pt"), ("onnx", ".onnx")):
        path = folder / f"best_deploy{ending}"
        path.write_bytes(name.encode() * 100)
        artifacts[name] = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "proved": True}
    for name, change in changes.items():
        artifacts[name] = {**artifacts.get(name, {}), **change}
    report = folder / "best_deploy_report.json"
    report.write_text(json.dumps({"schema": "rep_backbones/fuse_export/1", "artifacts": artifacts}))
    return report


def test_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = written(tmp_path, engine={"missing": "no CUDA device"})
    assert main(["--check", str(report)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fuse_export: best_deploy.pt: whole",
        "fuse_export: best_deploy.onnx: whole",
        "fuse_export: all 2 files are those that were reported (exit status 0)",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"onnx" * 99 + b"onny", "damaged or of another run"),
        (b"onnx" * 50, "200 bytes in place of 400"),
        (None, "not there"),
    ],
    ids=["one bit", "cut off", "lost"],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = written(tmp_path)
    (tmp_path / "best_deploy.onnx").unlink()
    if content is not None:
        (tmp_path / "best_deploy.onnx").write_bytes(content)
    assert main(["--check", str(report)]) == 3
    told = capsys.readouterr()
    assert "best_deploy.onnx: it is" in told.err and said in told.err and "export again" in told.err
    assert "best_deploy.pt: whole" in told.out, "the others are looked at all the same"


def test_what_is_not_proved_must_not_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(written(tmp_path, onnx={"proved": False}))]) == 3
    assert "best_deploy.onnx: whole, but NOT PROVED: do not deploy it" in capsys.readouterr().err
    assert main(["--check", str(written(tmp_path, onnx={"proved": None}))]) == 0
    assert "best_deploy.onnx: whole; it was not run" in capsys.readouterr().out


def test_a_run_that_made_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "best_deploy_report.json"
    report.write_text('{"schema": "rep_backbones/fuse_export/1", "artifacts": {}}')
    assert main(["--check", str(report)]) == 3
    assert "names no file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = written(tmp_path)
    (tmp_path / "best_deploy.onnx").unlink()
    os.mkfifo(tmp_path / "best_deploy.onnx")
    assert main(["--check", str(report)]) == 3
    assert "no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[1]", "has no schema"),
        (b'{"schema": "coco/1"}', "its schema is 'coco/1', and rep_backbones/fuse_export/1 is accepted"),
        (b'{"schema": "rep_backbones/fuse_export/1"}', "does not list its artefacts"),
        (b'{"schema": "rep_backbones/fuse_export/1", "artifacts": {"pt": 1}}', "does not list its artefacts"),
    ],
    ids=["missing", "empty", "bytes", "deep", "list", "other", "no artifacts", "number"],
)
def test_no_report(tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "best_deploy_report.json"
    if content is not None:
        report.write_bytes(content)
    assert main(["--check", str(report)]) == 2
    told = capsys.readouterr()
    assert said in told.err and "give the _deploy_report.json" in told.err and "Traceback" not in told.err


def test_a_report_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "LARGEST", 99)
    with pytest.raises(checking.NoReport, match="no report is that large"):
        checking.check(written(tmp_path))


def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = written(tmp_path)

    def failing(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checking, "sha256", failing)
    assert main(["--check", str(report)]) == 3
    assert "best_deploy.onnx: it cannot be read: Input/output error; export again" in capsys.readouterr().err


def test_a_link_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = written(tmp_path)
    (tmp_path / "best_deploy.onnx").unlink()
    (tmp_path / "best_deploy.onnx").symlink_to("best_deploy.onnx")
    assert main(["--check", str(report)]) in (2, 3), "newer Pythons resolve it, and find nothing there"
    assert "best_deploy.onnx" in capsys.readouterr().err


def test_folder_in_place_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(tmp_path)]) == 2
    assert "is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("../outside.onnx", "leads out of its folder"),
        ("{outside}", "leads out of its folder"),
        ("link.onnx", "leads out of its folder"),
        ("..\\outside.onnx", "leads out of its folder"),
        (".", "leads out of its folder"),
        ("", "a file name is accepted"),
        ("a\x00b", "a file name is accepted"),
        ("a\x1b[2Jb", "a file name is accepted"),
        (3, "a file name is accepted"),
        (None, "a file name is accepted"),
    ],
)
def test_paths_that_lead_out(tmp_path: Path, path: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside.onnx"
    folder.mkdir()
    outside.write_bytes(b"x")
    (folder / "link.onnx").symlink_to(outside)
    path = path.format(outside=outside) if isinstance(path, str) else path
    report = written(folder, evil={"path": path, "sha256": sha256(outside), "bytes": 1, "proved": True})
    assert main(["--check", str(report)]) == 2
    told = capsys.readouterr()
    assert said in told.err and "\x1b" not in told.err
    assert told.out == "", "nothing is called whole by a report that cannot be trusted"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "A" * 64}, "64 hexadecimal digits"),
        ({"sha256": 1}, "64 hexadecimal digits"),
        ({"proved": "yes"}, "not one of"),
    ],
)
def test_entries_of_another_kind(
    tmp_path: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", str(written(tmp_path, onnx=changes))]) == 2
    assert said in capsys.readouterr().err


def test_weights_or_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (([], "give a checkpoint"), (["best.pt", "--check", "a.json"], "give one of them")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2 and said in capsys.readouterr().err

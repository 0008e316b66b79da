"""Files that are no checkpoint, or a damaged one: each is refused with its own reason."""

from __future__ import annotations

import copy
import os
import pickle
import random
import socket
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import PROTOCOL, archive, built, refused, saved, tiny_yaml
from torch import nn
from ultralytics.utils import checks, downloads

from rep_backbones.yolo import checkpoint
from rep_backbones.yolo.checkpoint import Refused


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    return built(tiny_yaml())


@pytest.fixture(scope="session")
def good(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good") / "best.pt", tiny)


def test_a_missing_file_is_refused_before_anybody_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError(f"it was looked for on the network: {args}")

    monkeypatch.setattr(downloads, "attempt_download_asset", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    assert "does not exist" in refused(tmp_path / "yolo11n.pt")
    assert "is an address" in refused("https://example.org/best.pt")
    assert "cannot be read" in refused(tmp_path / f"{'x' * 5000}.pt")
    with pytest.raises(Refused, match="does not exist"):
        checkpoint.load(tmp_path / "yolo11n.pt", trust=True)


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("best.pt", b"", "empty"),
    "text": ("best.pt", b"nc: 80\nbackbone: []\n", "text file"),
    "web page": ("best.pt", b"<!DOCTYPE html><html>404</html>", "web page"),
    "git lfs": ("best.pt", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "onnx inside": ("best.pt", b"\x08\x09\x12\x07pytorch", "ONNX"),
    "onnx": ("best.onnx", b"\x08\x09\x12\x07pytorch", "exported model"),
    "engine": ("best.engine", b"ftrt", "exported model"),
    "yaml": ("yolo11n.yaml", b"nc: 80", ".yaml"),
    "no suffix": ("best", b"PK\x03\x04", "nothing"),
    "bare pickle": ("best.pt", pickle.dumps({"a": 1}, 2), "bare pickle"),
    "noise": ("best.pt", bytes(range(1, 256)), "not an archive"),
    "zip without end": ("best.pt", b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind_is_refused_with_its_own_reason(file: str, tmp_path: Path) -> None:
    name, data, reason = FILES[file]
    (tmp_path / name).write_bytes(data)
    assert reason in refused(tmp_path / name)


def test_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "best.pt").mkdir()
    assert "is a folder" in refused(tmp_path / "best.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "not a regular file" in refused(tmp_path / "pipe.pt")


def test_weights_alone_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    assert "state_dict" in refused(tmp_path / "weights.pt")
    torch.save({"state_dict": OrderedDict(tiny.state_dict()), "epoch": 3}, tmp_path / "timm.pt")
    assert "state_dict" in refused(tmp_path / "timm.pt")


def test_a_model_alone_and_no_model_at_all_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(tiny), tmp_path / "model.pt")
    assert "itself" in refused(tmp_path / "model.pt")
    assert "no model" in refused(saved(tmp_path / "none.pt", tiny, ema=None, model=None))
    assert "quantization" in refused(saved(tmp_path / "qat.pt", tiny, modelopt={"version": 1}))


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "best.pt", PROTOCOL + b"}.", {"x/code/__torch__.py": b"", "x/constants.pkl": b""})
    assert "TorchScript" in refused(path)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "x/../../evil", "x\\..\\evil"])
def test_an_archive_that_points_outside_is_refused(name: str, tmp_path: Path) -> None:
    assert "outside" in refused(archive(tmp_path / "evil.pt", PROTOCOL + b"}.", {name: b""}))


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.pt", PROTOCOL + b"}.", {"x/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16 and "compressed" in refused(path)


def test_an_archive_that_claims_more_than_it_has_is_refused(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    start = data.rindex(b"PK\x01\x02")  # the last entry of the table of contents
    data[start + 20 : start + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "evil.pt").write_bytes(data)
    assert "more bytes" in refused(tmp_path / "evil.pt")


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "best.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "no data.pkl" in refused(tmp_path / "best.pt")


def test_a_file_that_is_cut_off_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in [1, 2, 4, *range(100, len(data), len(data) // 25), len(data) - 1]:
        (tmp_path / "best.pt").write_bytes(data[:length])
        assert "best.pt" in refused(tmp_path / "best.pt"), f"cut off at {length}"


def test_a_flipped_bit_in_the_weights_is_found(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as file:
        record = max((info for info in file.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
    data[record.header_offset + record.file_size // 2] ^= 1
    (tmp_path / "best.pt").write_bytes(data)
    assert "damaged" in refused(tmp_path / "best.pt", checked=False)


def test_a_trusted_file_that_needs_a_missing_module_is_refused_without_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_requirements", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    path = archive(tmp_path / "evil.pt", PROTOCOL + b"cevil_package_nobody_has\nLayer\n.")
    with pytest.raises(Refused, match="'evil_package_nobody_has', which is not installed.*nothing is installed for you"):
        checkpoint.load(path, trust=True)
    assert "evil_package_nobody_has.Layer" in refused(path)


def test_damaged_pickles_are_refused_or_loaded_but_never_crash(good: Path, tmp_path: Path) -> None:
    """Random bytes of the program are changed, as by one who searches for a hole; the archive stays whole."""
    with zipfile.ZipFile(good) as file:
        records = {f"x/{info.filename.split('/', 1)[1]}": file.read(info) for info in file.infolist()}
    program = records.pop("x/data.pkl")
    generator = random.Random(0)
    outcomes = {"refused": 0, "loaded": 0}
    for number in range(150):
        changed = bytearray(program)
        for _ in range(generator.choice([1, 1, 2, 8])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path = archive(tmp_path / f"{number}.pt", bytes(changed), records)
        try:
            checkpoint.load(path)
            outcomes["loaded"] += 1
        except Refused:
            outcomes["refused"] += 1
        path.unlink()
    assert outcomes["refused"] > 50, outcomes

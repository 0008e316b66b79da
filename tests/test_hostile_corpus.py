"""The corpus of hostile files through every door: nothing runs, nothing is written or fetched, one line, exit status 2."""

from __future__ import annotations

import importlib
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import saved
from hostile import CHECKPOINTS, DATA, MODELS, cached, good
from torch import nn
from ultralytics.utils import checks

import rep_backbones.yolo.cli as rep_yolo
import rep_backbones.yolo.eval_coco as eval_coco
import rep_backbones.yolo.fuse_export_cli as fuse_export
from rep_backbones.yolo import checkpoint, door

pytestmark = pytest.mark.timeout(120)
MODES: dict[str, list[str]] = {
    "train": ["data=coco8.yaml", "epochs=1"],
    "val": ["data=coco8.yaml"],
    "predict": ["source=nothing.png"],
    "export": ["format=onnx"],
}
MEMORY = 600 << 10  # KiB that one file may claim; importing what a command needs takes a part of it


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the commands import lazily is not memory that a hostile file claimed. And the names in a harmless file are known
    to weights-only loading, as after one such load of the latest Ultralytics, which then reads on in a hostile one.
    """
    path = good(tmp_path_factory.mktemp("warm") / "good.pt")
    checkpoint.load(path)
    names = [name.rpartition(".") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    with torch.serialization.safe_globals([getattr(importlib.import_module(module), name) for module, _, name in names]):
        yield


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder three deep for the file. Afterwards there is no file that was not there before, wherever names lead to."""
    folder = tmp_path / "some" / "where" / "room"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"it left the process: {args}")

    for owner, name in ((socket.socket, "connect"), (subprocess, "Popen"), (checks, "check_requirements")):
        monkeypatch.setattr(owner, name, forbidden)
    yield folder
    assert not list(tmp_path.rglob("canary*")) and not Path("/tmp/canary").exists(), "code of the file ran"


def tree(folder: Path) -> set[Path]:
    top = folder.parent.parent.parent
    return {path for path in top.rglob("*") if folder / "runs" not in (path, *path.parents)}


def refused(run: Any, argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the tool refuses, once it is clear that it left everything as it was."""
    before, memory = tree(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capsys.readouterr()
    status = run(argv)
    err = capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY
    assert status == 2 and "Traceback" not in err, err
    assert tree(folder) == before
    (line,) = [line for line in err.splitlines() if line.startswith(("rep-yolo:", "fuse_export:", "eval_coco:"))]
    assert len(line) < 1000
    return line


def refused_by_all(path: Path, said: str, of_model: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model file, by each tool; rep-yolo names what it refuses as `of_model`."""
    assert said in refused(fuse_export.main, [str(path)], room, capsys)
    pictures = room / "pictures"
    pictures.mkdir()
    assert path.name in refused(eval_coco.main, [str(path), f"--data={cached(pictures, room / 'x')}"], room, capsys)
    for mode, words in MODES.items():
        assert of_model in refused(rep_yolo.main, [mode, f"model={path}", *words], room, capsys)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint(name: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = CHECKPOINTS[name](room, room.parent / "canary")
    with pytest.raises(checkpoint.Refused, match="evil.pt"):
        checkpoint.load(path)
    with pytest.raises(checkpoint.Refused, match="evil.pt"):
        checkpoint.as_ultralytics(path)
    refused_by_all(path, "evil.pt", "evil.pt", room, capsys)


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_yaml(name: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = MODELS[name](room, room.parent / "canary")
    refused_by_all(path, "is accepted", "the model's YAML", room, capsys)


@pytest.mark.parametrize("name", DATA)
def test_hostile_data(name: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = DATA[name](room, room.parent / "canary"), good(room / "good.pt")
    for tool in (eval_coco.main, fuse_export.main):
        assert "evil." in refused(tool, [str(model), f"--data={data}"], room, capsys)
    for mode in ("train", "val"):
        line = refused(rep_yolo.main, [mode, f"model={model}", f"data={data}", f"project={room}/runs", *WORDS], room, capsys)
        assert "evil." in line
        assert "--trust" in line or "not found" in line, "8.3 has no lists of addresses"


WORDS = ["workers=0", "plots=False", "device=cpu", "imgsz=64", "batch=2", "epochs=1"]


def test_a_label_cache_with_code_is_made_anew(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(door.LOGGER, "warning", said.append)
    data, model = cached(room, room.parent / "canary"), good(room / "good.pt")
    before = (room / "labels.cache").read_bytes()
    for _ in range(2):  # the second time it is our own
        assert rep_yolo.main(["val", f"model={model}", f"data={data}", f"project={room}/runs", *WORDS]) == 0
        assert (room / "labels.cache").read_bytes() != before
    (line,) = [line for line in said if "labels.cache" in line]
    assert "is not used: it refers to posix.system" in line


def test_data_that_a_checkpoint_names(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`val` without data= takes that of the training, or one of Ultralytics' own, which is not fetched unasked either."""
    data = DATA["python in download"](room, room.parent / "canary")
    model = good(room / "good.pt", train_args={"data": str(data), "imgsz": 64, "task": "detect"})
    assert "`download:` is not run" in refused(rep_yolo.main, ["val", f"model={model}"], room, capsys)


EXECUTED = [
    *("os.system", "eval in the arguments", "nested in a state dict", "a pickle in a pickle", "a dotted name"),
    *("a name in another case", "two tables of contents", "a tar that is a zip"),
]


@pytest.mark.parametrize("name", EXECUTED)
def test_the_corpus_is_real(name: str, tmp_path: Path) -> None:
    """These files do run when torch.load unpickles them."""
    canary = tmp_path / "canary"
    path = CHECKPOINTS[name](tmp_path, canary)
    try:
        torch.load(path, weights_only=False)
    except Exception:  # many are broken behind the call
        pass
    assert canary.exists()


def test_a_good_checkpoint_is_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the sweeps above do not refuse everything."""
    model: nn.Module = checkpoint.load(good(tmp_path / "good.pt")).model
    assert fuse_export.main([str(saved(tmp_path / "again.pt", model)), "--imgsz", "64"]) == 0

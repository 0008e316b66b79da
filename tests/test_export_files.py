"""Artefacts that are folders: their hash, and how they get their places."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from rep_backbones.export import files
from rep_backbones.export.report import bytes_of, sha256


def folder(path: Path, **content: str) -> Path:
    for name, text in content.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_hash_of_a_folder(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", b="2", a="1", in__c="3")
    lines = "".join(
        f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in [("a", b"1"), ("b", b"2"), ("in/c", b"3")]
    )
    assert sha256(one) == hashlib.sha256(lines.encode()).hexdigest()
    assert bytes_of(one) == 3 and bytes_of(one / "a") == 1
    assert sha256(folder(tmp_path / "two", in__c="3", a="1", b="2")) == sha256(one), "whatever they were made in"


@pytest.mark.parametrize("other", [{"a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {"a": "1", "b": "2", "c": ""}])
def test_hash_sees_every_change_in_a_folder(tmp_path: Path, other: dict[str, str]) -> None:
    assert sha256(folder(tmp_path / "other", **other)) != sha256(folder(tmp_path / "one", a="1", b="2"))


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
@pytest.mark.parametrize("before", ["nothing", "a folder", "a file", "a link"])
@pytest.mark.parametrize("new", ["a folder", "a file"])
def test_a_place_is_taken_whole(
    tmp_path: Path, before: str, new: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda made, path: False)
    target, path = tmp_path / "target", tmp_path / "x_openvino_model"
    if before == "a folder":
        folder(path, old="1", deep__old="2")
    elif before == "a file":
        path.write_text("old")
    elif before == "a link":
        path.symlink_to(folder(target, kept="1"))
    with files.workplace(tmp_path) as work:
        made = folder(work / "made", new="3") if new == "a folder" else folder(work, made="3") / "made"
        files.place([(made, path)])
    left = {name: text for name, text in (("kept", "1"),) if before == "a link"}
    assert {file.name: file.read_text() for file in target.rglob("*")} == left, "what a link points to is left alone"
    assert not path.is_symlink()
    found = {file.name: file.read_text() for file in (path.rglob("*") if path.is_dir() else [path])}
    assert found == ({"new": "3"} if new == "a folder" else {path.name: "3"})
    assert {entry.name for entry in tmp_path.iterdir()} <= {"target", path.name}


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="only Linux exchanges two folders in one step")
def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", a="1"), folder(tmp_path / "two", b="2")
    if not files._exchanged(one, two):
        pytest.skip("this file system does not")
    assert [entry.name for entry in (*one.iterdir(), *two.iterdir())] == ["b", "a"]


def test_a_place_that_cannot_be_taken_is_named(tmp_path: Path) -> None:
    made = folder(tmp_path / "made", a="1")
    with pytest.raises(files.TargetError, match="no/such"):
        files.place([(made, tmp_path / "no" / "such")])

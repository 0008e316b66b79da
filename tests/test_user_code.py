"""`--import my_layers.py`: the user's own layers, in YAMLs and checkpoints of both tools, under safe loading."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine.model import Model
from yolo_helpers import randomize_norms

import rep_backbones.yolo.cli as rep_yolo
import rep_backbones.yolo.fuse_export_cli as fuse_export
from rep_backbones.registry import LAYERS
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import user_code
from rep_backbones.yolo.plain_data import Refused

PAGE = (Path(__file__).parent.parent / "docs" / "write-your-own-block.md").read_text()
CODE = PAGE.split("```python\n")[1].split("```")[0]  # the CrossBlock that the page shows, as my_layers.py
YAML = """nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, CrossBlock, [16, 3, 2]]
  - [-1, 2, CrossBlock, [32, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc]]
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test imported is unknown again to the next one."""
    layers, modules, path = dict(LAYERS), set(sys.modules), list(sys.path)
    yield
    LAYERS.clear()
    LAYERS.update(layers)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]
    sys.path[:] = path


def forget() -> None:
    del LAYERS["CrossBlock"], sys.modules["my_layers"]


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    (tmp_path / "my_layers.py").write_text(CODE)
    (tmp_path / "mine.yaml").write_text(YAML)
    return tmp_path / "my_layers.py"


@pytest.fixture
def weights(layers: Path) -> Path:
    """A checkpoint with layers that are pickled as `my_layers.CrossBlock`, whose module is unknown by now."""
    user_code.load([layers])
    torch.manual_seed(0)
    model = YOLO(str(layers.with_name("mine.yaml")))
    randomize_norms(model.model)
    model.model.args = model.ckpt = {"imgsz": 64}
    model.save(layers.with_name("mine.pt"))
    forget()
    return layers.with_name("mine.pt")


def test_fuse_export_knows_the_layers(layers: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuse_export.main([str(weights), "--imgsz", "64"]) == 2, "not imported"
    assert "my_layers.CrossBlock" in capsys.readouterr().err
    assert fuse_export.main([str(weights), "--imgsz", "64", "--import", str(layers)]) == 0
    assert "fused 3 multi-branch layers" in capsys.readouterr().out
    assert "trust" not in str(capsys.readouterr())


@pytest.mark.parametrize("words", [["import={}"], ["--import", "{}"], ["--import={}"], ["import", "=", "{}"]], ids=" ".join)
def test_rep_yolo_knows_the_layers(words: list[str], layers: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Model] = []
    monkeypatch.setattr(Model, "train", lambda self, **kwargs: seen.append(self))
    for model in (layers.with_name("mine.yaml"), weights):
        command = ["train", f"model={model}", "data=coco8.yaml"]
        assert rep_yolo.main(command) == 2, "not imported"
        assert rep_yolo.main([*command, *(word.format(layers) for word in words)]) == 0
        forget()
    assert [len(multi_branch(model.model)) for model in seen] == [3, 3]


def test_several_imports_and_modules_of_packages(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = layers.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "blocks.py").write_text(CODE.replace("CrossBlock", "OtherBlock"))
    monkeypatch.chdir(layers.parent)
    assert user_code.load([layers, "my_package.blocks"]) == []
    assert LAYERS["CrossBlock"].cls.__module__ == "my_layers"
    assert LAYERS["OtherBlock"].cls.__module__ == "my_package.blocks"
    assert user_code.load([layers]) == [], "a second time changes nothing"


def test_code_that_registers_nothing_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_helpers.py").write_text("x = 1\n")
    (note,) = user_code.load([tmp_path / "my_helpers.py"])
    assert "my_helpers.py registers no layer" in note and "register_layer" in note
    assert rep_yolo.main(["version", f"import={tmp_path / 'my_helpers.py'}"]) == 0
    assert "note: " in capsys.readouterr().err


BAD: dict[str, tuple[str, str]] = {  # a file -> its content, and what is said
    "my_missing.py": ("", "no such file"),
    "my-layers.py": ("x = 1", "rename the file"),
    "json.py": ("x = 1", "the name 'json' belongs to"),
    "sys.py": ("x = 1", "belongs to Python itself"),
    "statistics.py": ("x = 1", "the name 'statistics' belongs to"),
    "my_raising.py": ("a = 1\nraise KeyError('colour')", "(KeyError: 'colour') at my_raising.py:2"),
    "my_exiting.py": ("raise SystemExit(0)", "SystemExit"),
    "my_broken.py": ("def", "SyntaxError"),
    "my_needing.py": ("import not_installed_here", "nothing is installed for you"),
    "my_clash.py": ("import torch, rep_backbones\n@rep_backbones.register_layer\nclass RepConv(torch.nn.Module):\n"
                    "    def __init__(self, c1, c2): ...", "belongs to rep_backbones"),
    "not a module": ("", "neither a file nor a module"),
    "my_nowhere.blocks": ("", "No module named 'my_nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("tool", [fuse_export.main, rep_yolo.main], ids=["fuse_export", "rep_yolo"])
def test_bad_code_is_one_line_and_status_2(
    tool: Callable[[list[str]], int],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = BAD[name]
    if content:
        Path(name).write_text(content)
    words = [str(tmp_path / "best.pt")] if tool is fuse_export.main else ["predict", "model=best.pt"]
    assert tool([*words, "--import", name]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1 and f"--import {name}" in err
    assert Path(name).stem not in sys.modules or not name.startswith("my_")


def test_a_file_that_raised_can_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "my_layers.py"
    file.write_text("raise ValueError")
    with pytest.raises(Refused, match="mend it"):
        user_code.load([file])
    file.write_text(CODE)
    assert user_code.load([file]) == []

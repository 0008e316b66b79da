"""docs/blocks.md: each block has its picture, drawn from itself, a row that builds, and its measured cost."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from torch import nn
from ultralytics.nn import tasks

from rep_backbones import fuse, recompute
from rep_backbones.export import diagram
from rep_backbones.registry import LAYERS, ours
from rep_backbones.rules import branch_names, multi_branch
from rep_backbones.yolo import pages
from rep_backbones.yolo.block_pages import TOOL, draw, main
from rep_backbones.yolo.training_cost import plain_twin, saved_bytes, step_costs

PAGE = Path(__file__).parent.parent / "docs" / "blocks.md"
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))


def words(picture: Path) -> list[str]:
    return [text for element in ElementTree.parse(picture).iter() if (text := (element.text or "").strip())]


def test_every_block_has_a_section_and_a_row_in_the_table() -> None:
    assert set(SECTIONS) == set(ours())
    assert re.findall(r"^\| \[(\w+)\]", pages.part(PAGE, TOOL), re.MULTILINE) == ours()


@pytest.mark.parametrize("name", ours())
def test_a_section_is_whole(name: str) -> None:
    section = SECTIONS[name]
    assert f"![{name}](pictures/blocks/{name}.svg)" in section
    assert "Use it" in section and re.search(r"\b(19|20)\d\d\b", section), "when to use it, and the year of its source"
    rows = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert rows and name in rows[1]
    config = {"nc": 2, "scales": {"n": [1.0, 0.125, 1024]}, "scale": "n", "head": [[[-1], 1, "Detect", ["nc"]]]}
    config["backbone"] = [[-1, 1, "Conv", [64, 3, 2]], *yaml.safe_load(rows[1])]
    layers, _ = tasks.parse_model(config, 3, verbose=False)
    assert any(type(module) is LAYERS[name].cls for module in layers.modules())


@pytest.mark.parametrize("name", ours())
def test_the_committed_picture_shows_the_block_as_it_is(name: str, tmp_path: Path) -> None:
    committed = words(PAGE.parent / "pictures" / "blocks" / f"{name}.svg")
    assert committed == words(draw(name, tmp_path)), f"python {TOOL} draws it anew"
    layer = LAYERS[name].cls(64, 64)
    for _, _, part in multi_branch(layer):
        assert len(branch_names(part)) == 0 or set(committed) >= {n for n in branch_names(part) if not n.isdigit()}
    convs = sum(isinstance(m, nn.Conv2d) for form in (layer, fuse(layer.eval())) for m in form.modules())
    assert sum(word[0].isdigit() and "×" in word and "av" not in word and "fixed" not in word for word in committed) == convs


def test_a_layer_of_another_kind_is_drawn_by_its_name(tmp_path: Path) -> None:
    diagram.save(tmp_path / "a.svg", [("mine", nn.Sequential(nn.Conv2d(4, 4, (1, 3), 2, groups=2), nn.PixelShuffle(2)))])
    assert words(tmp_path / "a.svg")[-3:] == ["mine", "1×3 in 2 groups, stride 2", "PixelShuffle"]


@pytest.mark.parametrize(
    ("name", "ratio"), [("ConvBNAct", 1.0), ("RepVGGBlock", 1.33), ("ACBlock", 1.67), ("DiverseBranchBlock", 3.4)]
)
def test_activations_kept_for_the_backward(name: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the authors' own blocks keep, in multiples of conv + BN + ReLU; ours keep less than that."""
    monkeypatch.setattr(recompute, "applies", lambda x: False)
    layer, x = LAYERS[name].cls(32, 32).train(), torch.randn(8, 32, 80, 80)
    assert saved_bytes(layer, x) / saved_bytes(plain_twin(layer), x) == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("name", ours())
def test_the_plain_twin_has_the_same_deployed_form(name: str) -> None:
    layer = LAYERS[name].cls(8, 8).train()
    twin = plain_twin(layer)
    assert layer.training and all(m.training for m in twin.modules())
    shapes = [[m.weight.shape for m in fuse(form.eval()).modules() if isinstance(m, nn.Conv2d)] for form in (layer, twin)]
    assert shapes[0] == shapes[1] and all(p.requires_grad for p in twin.parameters())
    assert not any(m.bias is not None for m in twin.modules() if isinstance(m, nn.Conv2d))


def test_steps_are_timed_in_turn() -> None:
    order: list[str] = []

    class Noting(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return super().forward(x)

    layers = {name: Noting(2, 2, 1) for name in "ab"}
    for name, layer in layers.items():
        layer.name = name
    costs = step_costs(layers, torch.randn(1, 2, 4, 4), repeats=2, warmup=1)
    assert order == list("ab") * 4 and [len(cost.seconds) for cost in costs.values()] == [2, 2]


def test_a_page_without_marks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    assert main(["--out", str(page), "--blocks", "RepConv", "--repeats", "1"]) == 2
    assert page.read_text() == "mine" and "lacks the marks" in capsys.readouterr().err
    page.write_text(f"{pages.start(TOOL)}\n{pages.END}\nmine")
    assert main(["--out", str(page), "--blocks", "RepConv", "--repeats", "1"]) == 0
    assert "| [RepConv](#repconv) | 41,344 | 36,928 |" in page.read_text() and page.read_text().endswith("mine")
    assert (tmp_path / "pictures" / "blocks" / "RepConv.svg").exists()

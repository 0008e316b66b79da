"""docs/training.md: its table is there, and its tool measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rep_backbones import blocks
from rep_backbones.gradient_form import masked
from rep_backbones.online import Online
from rep_backbones.rep_optimizers import RepSGD
from rep_backbones.yolo import forms_cost, pages
from rep_backbones.yolo.training_cost import Cost, step_costs

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def test_the_page_has_a_row_for_each_block_and_shape() -> None:
    rows = [line.split("|")[1].strip() for line in pages.part(PAGE, forms_cost.TOOL).splitlines() if "**" in line]
    assert rows == [name for name in forms_cost.BLOCKS for _ in forms_cost.SHAPES] + list(forms_cost.TRUNKS)


def test_the_forms_of_a_block() -> None:
    made = forms_cost.forms(blocks.RepVGGBlock(4, 4))
    assert list(made) == ["plain", "branches", "online", "gradient"] and all(model.training for model in made.values())
    assert [any(isinstance(m, Online) for m in model.modules()) for model in made.values()] == [False, False, True, False]
    assert [any(masked(model)) for model in made.values()] == [False, False, False, True]
    assert isinstance(forms_cost.optimizer_for("gradient", made["gradient"]), RepSGD)
    assert list(forms_cost.forms(blocks.DiverseBranchBlock(4, 4))) == ["plain", "branches", "online"]


def test_ratios_are_of_one_round() -> None:
    costs = {"plain": Cost([1.0, 2.0], 8), "online": Cost([2.0, 2.0], 8)}
    assert forms_cost.ratios(costs, "online") == [2.0, 1.0]


def test_a_step_with_an_optimizer_takes_it() -> None:
    layer = nn.Conv2d(2, 2, 1)
    before = layer.weight.detach().clone()
    step_costs({"a": layer}, torch.ones(1, 2, 4, 4), repeats=1, warmup=0)
    assert torch.equal(layer.weight, before)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    step_costs({"a": layer}, torch.ones(1, 2, 4, 4), repeats=1, warmup=0, optimizers={"a": optimizer})
    assert not torch.equal(layer.weight, before)


def test_the_tool_fills_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forms_cost, "SHAPES", ((1, 4, 6),))
    page = tmp_path / "page.md"
    page.write_text("mine")
    command = ["--out", str(page), "--blocks", "RepVGGBlock", "DiverseBranchBlock", "--repeats", "1", "--trunks"]
    assert forms_cost.main(command) == 2
    assert page.read_text() == "mine" and "lacks the marks" in capsys.readouterr().err
    page.write_text(f"{pages.start(forms_cost.TOOL)}\n{pages.END}\nmine")
    assert forms_cost.main(command) == 0
    first, second = page.read_text().splitlines()[-5:-3]
    assert first.startswith("| RepVGGBlock | 1, 4, 6 | **") and second.endswith("| none |") and "| none |" in second
    assert page.read_text().endswith("mine")
    assert forms_cost.main(["--out", str(page), "--blocks", "--trunks", "repvgg_a"]) == 2
    assert "repvgg_a" in capsys.readouterr().err

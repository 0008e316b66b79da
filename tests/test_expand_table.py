"""The table of docs/expand.md: how its numbers are measured, and that it names every network and block with nothing left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rep_backbones import fuse
from rep_backbones.candidates import ExpandError
from rep_backbones.registry import LAYERS
from rep_backbones.yolo import expand_table, pages
from rep_backbones.yolo.expand_table import SUBJECTS, TOOL, Subject, crnet, main, measure, network

DOCS = Path(__file__).parent.parent / "docs" / "expand.md"
SMALL = Subject(crnet, (2, 2, 20, 24), (1, 2, 32, 32))
OURS = {name for name, layer in LAYERS.items() if layer.cls.__module__.startswith("rep_backbones.")}


def test_a_row_is_measured_on_branches_that_speak() -> None:
    plain = network(SMALL)
    row = measure(plain, "RepVGGBlock", SMALL)
    convs = sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in plain.modules())
    assert (row.expanded, row.left) == (convs, 0)
    assert max(row.in_eval, row.in_train) == 0 and 0 < row.fused < 1e-5, "each form rounds in its own way"
    assert row.parameters[1] == sum(p.numel() for p in fuse(plain).parameters()) < row.parameters[0]
    assert row.multiply_adds[1] < row.multiply_adds[0]


def test_a_wrong_fuse_shows_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_tap(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        with torch.no_grad():
            next(m for m in fused.modules() if isinstance(m, nn.Conv2d)).weight[0, 0, 0, 0] += 0.1
        return fused

    monkeypatch.setattr(expand_table, "deployed", off_by_a_tap)
    assert measure(network(SMALL), "RepVGGBlock", SMALL).fused > 1e-3


def test_a_block_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ExpandError, match="behind the sum"):
        measure(network(SMALL), "QARepVGGBlock", SMALL)


def test_only_the_part_between_the_marks_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{pages.start(TOOL)}\nold\n{pages.END}\nbelow\n")
    arguments = ["--out", str(page), "--models", "a CRNet", "--blocks", "RepConv", "QARepVGGBlock"]
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "### a CRNet" in text and "| RepConv | 11 |" in text
    assert "- QARepVGGBlock: it normalizes its kxk branch" in text
    page.write_text("no marks")
    assert main(arguments) == 2 and page.read_text() == "no marks"
    assert "lacks the marks" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "none" / "page.md"), *arguments[2:]]) == 2


def test_the_committed_table_is_whole() -> None:
    """Every network with every block of ours, or the block among the refused; no branch left, no function changed."""
    table = pages.part(DOCS, TOOL)
    sections = dict(re.findall(r"### ([^\n]+)\n(.*?)(?=\n### |\Z)", table, re.DOTALL))
    refused = set(re.findall(r"\w+", " ".join(re.findall(r"^- ([\w, ]+):", sections.pop("Refused"), re.MULTILINE))))
    assert sections.keys() == SUBJECTS.keys()
    for name, section in sections.items():
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
            2:
        ]
        assert {row[0] for row in rows} == OURS - refused, name
        plain = re.search(r"Plain, as deployed: ([\d,]+) parameters, ([\d,.]+) M", section)
        for _, expanded, _, parameters, _, cost, in_eval, in_train, fused, left in rows:
            assert int(expanded) > 0 and left == "0"
            assert max(map(float, (in_eval, in_train))) <= 1e-6 and float(fused) <= 1e-5
            assert plain and cost == plain[2] and (parameters == plain[1] or name == "ResNet-50"), (name, parameters)

"""docs/models.md: its numbers are those of `fuse_export`, and no model YAML is missing or has changed since it was made."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
from test_fuse_export import saved
from test_models import PACKAGED, numbers_on_paper
from yolo_helpers import model_yaml

from rep_backbones.export.latency import Latency
from rep_backbones.export.report import Counts
from rep_backbones.yolo import artifacts, models_table, names, pages
from rep_backbones.yolo.fuse_export import run
from rep_backbones.yolo.models_table import COUNTED, TIMED, TOOL, Counted, counted, main, table
from rep_backbones.yolo.published import PUBLISHED

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for index, row in enumerate(rows) if index != 1]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty page, beside two small models that stand for those of the package."""
    model_yaml(tmp_path, "mixed")
    model_yaml(tmp_path, "mixed", "classify")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "packaged", lambda: ["tiny-mixed-classify.yaml", "tiny-mixed-detect.yaml"])
    file = tmp_path / "page.md"
    file.write_text(f"above\n{pages.start(TOOL)}\nold\n{pages.END}\nbelow\n")
    return file


def test_numbers_are_those_of_a_report(tmp_path: Path) -> None:
    outcome = run(saved(tmp_path), formats=("onnx",), latency=False, imgsz=128)
    found, file = counted(str(model_yaml(tmp_path)), tmp_path, size=128, export=True)
    assert {"before": found.before, "after": found.after} == outcome.report.counts
    assert found.before.gflops > found.after.gflops > 0
    assert file is not None
    assert onnxruntime.InferenceSession(file).get_inputs()[0].shape == [1, 3, 128, 128]
    row = [cell.replace(",", "") for cell in found.cells()[1:]]
    assert row == ["154534", "150790", "0.1", "0.1", "4", "26", "22"]


def test_a_deep_network_of_many_branches_is_counted_and_proved(tmp_path: Path) -> None:
    found, file = counted("mobileone-s0.yaml", tmp_path, size=64, export=True)
    assert (found.before.multi_branch_layers, found.after.multi_branch_layers) == (43, 0) and file is not None


def test_the_part_between_the_marks_is_written(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(page), "--imgsz", "64", "--runs", "1"]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert f"Written by `python {TOOL} --out {page} --imgsz 64 --runs 1` on 20" in text
    assert "Pictures of 64 x 64. Times: batch 1, cpu (" in text and "median of 1 rounds" in text
    header, *rows = cells(text)
    assert header == [*COUNTED, *TIMED, "published"]
    assert [row[:2] for row in rows] == [["tiny-mixed-classify.yaml", "76,499"], ["tiny-mixed-detect.yaml", "154,534"]]
    assert all(re.fullmatch(r"\d+ to \d+", row[-2]) for row in rows)
    assert "timing: 100%" in capsys.readouterr().err


def test_only_some_are_printed_and_the_page_stays(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = PAGE.read_bytes()
    assert main(["--only", "*-classify.yaml", "--no-latency"]) == 0
    told = capsys.readouterr().out
    header, row = cells(told)
    assert header == [*COUNTED, "published"] and row[0] == "tiny-mixed-classify.yaml"
    assert "Pictures of 224 x 224." in told and "Times" not in told
    assert PAGE.read_bytes() == before and "old" in page.read_text()


def test_rows_of_several_sizes_and_what_was_published() -> None:
    before, after = Counts(35, 114, 4_944_752, 13.24), Counts(0, 79, 4_532_800, 11.86)
    rows = [Counted("efficientrep-n.yaml", 640, before, after), Counted("mine.yaml", 224, before, after)]
    times = {row.name: Latency(59.6, 58.0, 61.2, 5) for row in rows}
    first, second = cells(table(rows, times))[1:]
    assert first[1:10] == ["4,944,752", "4,532,800", "13.2", "11.9", "35", "114", "79", "60", "58 to 61"]
    assert "backbone 3,435,296 and neck 1,193,952" in first[10] and second[10] == ""
    assert models_table._sizes(rows) == "Pictures of 640 x 640, of 224 x 224 for mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "resnet*"], "--only resnet* matches no model; there are tiny-mixed-classify.yaml"),
        (["--runs", "0"], "--runs 0 is not accepted"),
        (["--imgsz", "100"], "--imgsz 100 is not accepted; give a multiple of 64"),
        (["--out", "tiny-mixed-detect.yaml"], "lacks the marks"),
        (["--out", "none/page.md"], "cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input(page: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_file_that_is_not_proved_leaves_the_page(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = artifacts.OnnxModel.__call__
    monkeypatch.setattr(artifacts.OnnxModel, "__call__", lambda self, x: [y * 1.01 for y in stock(self, x)])
    assert main(["--out", str(page), "--imgsz", "64"]) == 3
    told = capsys.readouterr().err
    assert "tiny-mixed-classify.onnx computes something else than the fused model" in told and "old" in page.read_text()


def test_an_interrupt_leaves_the_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models_table, "table", interrupted)
    assert main(["--out", str(page), "--imgsz", "64", "--no-latency"]) == 130
    assert "old" in page.read_text()


def test_the_committed_page_has_every_model_as_it_is() -> None:
    """Parameters and layers with branches in training, counted anew; `python tools/models_table.py` makes the page anew."""
    header, *rows = cells(pages.part(PAGE, TOOL))
    assert header == [*COUNTED, *TIMED, "published"]
    there = {row[0]: dict(zip(range(1, len(row)), row[1:])) for row in rows}
    assert set(PACKAGED) <= there.keys() and there.keys() <= {*PACKAGED, *names.packaged()}
    for name in PACKAGED:
        parameters, layers, _, fewer = numbers_on_paper(name)
        row = there[name]
        assert (row[1], row[5]) == (f"{parameters:,}", str(layers)), f"{name} has changed: run python {TOOL}"
        assert row[10] == PUBLISHED.get(name.removesuffix(".yaml"), "")
        training, deployed = (int(row[index].replace(",", "")) for index in (1, 2))
        assert deployed < training and float(row[4]) <= float(row[3]) and int(row[7]) == int(row[6]) - fewer

"""The study: what it trains, what it makes of the numbers, that it can be stopped, and its page."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rep_backbones.fuse import fuse
from rep_backbones.gradient_form import masked
from rep_backbones.online import Online
from rep_backbones.yolo import pages, study
from rep_backbones.yolo.studies import one, page, plan
from rep_backbones.yolo.studies.costs import latencies, spread, times
from rep_backbones.yolo.studies.plan import EPOCHS, PLAIN, PROFILES, VARIANTS, WALL_TIME, Run

PAGE = Path(__file__).parent.parent / "docs" / "study.md"
QUICK = PROFILES["quick"]


def built(variant: plan.Variant, folder: Path) -> nn.Module:
    return plan.built(variant, plan.written(plan.detector(variant, QUICK, 3), folder / "detector.yaml"))


def shapes_of(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in fuse(model.eval()).modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_all_variants_deploy_the_same_network(variant: plan.Variant, tmp_path: Path) -> None:
    assert shapes_of(built(variant, tmp_path)) == shapes_of(built(VARIANTS[0], tmp_path))


def test_each_variant_is_trained_in_its_form(tmp_path: Path) -> None:
    models = {variant.name: built(variant, tmp_path) for variant in VARIANTS}
    online = [name for name, model in models.items() if any(isinstance(m, Online) for m in model.modules())]
    gradient = [name for name, model in models.items() if any(True for _ in masked(model))]
    assert (online, gradient) == (["RepVGG, online"], ["RepVGG, gradient"])
    assert [v.name for v in VARIANTS if v.optimizer == "RepAdamW"] == gradient
    plain = models.pop(PLAIN)
    for name, model in models.items():
        more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        assert more > 0 or name in gradient


def test_budgets() -> None:
    costs = {"steps": {variant.name: {"times": [1.0, 2.0, 9.0]} for variant in VARIANTS}}
    assert set(times(costs).values()) == {2.0}
    measured = {**dict.fromkeys((variant.name for variant in VARIANTS), 1.0), "DBB": 2.4, "MobileOne": 1e6}
    epochs = plan.budgets(replace(QUICK, epochs=12), measured)
    assert set(epochs[EPOCHS].values()) == {12}
    assert epochs[WALL_TIME] == {**epochs[EPOCHS], "DBB": 5, "MobileOne": 1}


def test_no_training_is_done_twice() -> None:
    epochs = plan.budgets(replace(QUICK, epochs=12), {**{v.name: 1.0 for v in VARIANTS}, "DBB": 3.0})
    wanted = list(plan.runs(QUICK, {"a": 3, "b": 2}, 3, epochs))
    assert len(wanted) == len({run.place for run in wanted}) == len(set(wanted)) == 3 * 2 * (len(VARIANTS) + 1)
    assert [run.seed for run in wanted] == sorted(run.seed for run in wanted)  # a stopped study has whole seeds
    assert {run.detector["nc"] for run in wanted if run.data == "b"} == {2}


# ---- what is made of the numbers -----------------------------------------------------------------------------------------


def test_differences_and_their_noise() -> None:
    points = {
        PLAIN: [50.0, 51.0, 52.0],
        "RepVGG": [51.0, 52.0, 53.0],
        "DBB": [57.0, 58.0, 59.0],
        "ACNet": [40.0, 41.0, 42.0],
    }
    found = page.differences(points)
    assert [found[name].points for name in ("RepVGG", "DBB", "ACNet")] == pytest.approx([1, 7, -10])
    assert found["DBB"].error == pytest.approx((2 / 3) ** 0.5)  # the deviation within is 1 everywhere
    assert [found[name].verdict for name in ("RepVGG", "DBB", "ACNet")] == ["within the noise", "better", "worse"]


def test_the_deviation_is_within_groups() -> None:
    assert page.pooled([[1.0, 3.0], [10.0, 12.0], [5.0]]) == pytest.approx(2**0.5)
    assert page.pooled([[1.0], [2.0]]) is None
    alone = page.differences({PLAIN: [1.0], "DBB": [2.0]})["DBB"]
    assert alone.error is None and "unknown" in alone.verdict
    assert page.differences({"DBB": [2.0]}) == {}


def test_spread() -> None:
    assert spread([3.0]) == "3.00"
    low, middle, high = statistics.quantiles([1.0, 2.0, 4.0, 8.0], n=4)
    assert spread([1.0, 2.0, 4.0, 8.0], "{:.3f}") == f"{middle:.3f} ({low:.3f} to {high:.3f})"


def told(seeds: int = 3, done: int | None = None) -> page.Told:
    """A study whose AP of DBB is 5 points over that of all others."""
    epochs = plan.budgets(replace(QUICK, epochs=4), {**{v.name: 1.0 for v in VARIANTS}, "DBB": 2.0})
    wanted = list(plan.runs(QUICK, {"cells": 3}, seeds, epochs))
    found: dict[Run, dict[str, Any]] = {}
    for run in wanted[:done]:
        ap = 0.4 + 0.01 * run.seed + 0.05 * (run.variant == "DBB")
        counts = {"parameters": 100, "parameters_trained": 200, "convolutions": 9, "gflops": 0.5, "branches_left": 0}
        found[run] = {
            "ap": ap,
            "ap50": ap,
            "int8_ap": ap - 0.02,
            "seconds": 7.0,
            "cpu_seconds": 6.0,
            "error": 1e-7,
            **counts,
        }
    steps = {variant.name: {"ms": [1.0, 2.0], "times": [1.0, 1.0], "memory": 1.0} for variant in VARIANTS}
    return page.Told(QUICK, wanted, found, {"steps": steps}, epochs, {}, "a machine", 2, 1, "python tools/study.py")


def test_the_tables() -> None:
    text = page.text(told(), "study.svg")
    assert "complete" not in text and "3 seeds" in text
    lines = [line for line in text.splitlines() if line.startswith("| DBB")]
    assert "4 / 2" in lines[0]  # epochs of the two budgets
    assert (
        "| 4 | **46.00** ± 1.00 | 45.0, 46.0, 47.0 | +5.00 ± 1.63 | better | 44.00 | 2.00 (2.00 to 2.00) | 7 / 6 |"
        in lines[1]
    )
    assert "| 2 | **46.00**" in lines[2]
    plain = [line for line in text.splitlines() if line.startswith("| plain")]
    assert len(plain) == 3 and "41.00" in plain[1] == plain[2][: len(plain[1])] or "41.00" in plain[2]
    assert "2 of 14 differences are larger" in text
    assert "<svg" in page.picture(told())


def test_an_unfinished_study_says_so() -> None:
    text = page.text(told(done=3), "study.svg")
    assert "**Not complete: 3 of 27 runs are done.**" in text
    assert "one seed: unknown" in text and "Noise" not in text
    nothing = told(done=0)
    assert page.picture(nothing) == "" and "0 of 27" in page.text(nothing, "study.svg")


def test_the_committed_page_is_complete() -> None:
    text = pages.part(PAGE, study.TOOL)
    assert "Not complete" not in text
    for variant in VARIANTS:
        rows = [line for line in text.splitlines() if line.startswith(f"| {variant.name} |")]
        assert len(rows) == 2 + 2 * len(plan.BUDGETS)  # costs, what is deployed, and two data sets
    deployed = text.partition("## What is deployed")[2].partition("\n## ")[0].splitlines()
    rows = [
        line.split("|")[2:6]
        for line in deployed
        if line.startswith("| ") and "convolutions" not in line and "---" not in line
    ]
    assert len(rows) == len(VARIANTS) and all(row == rows[0] for row in rows)
    assert int(rows[0][1]) == 0  # branches left
    assert (PAGE.parent / "pictures" / "study.svg").exists()


# ---- a run, and the whole tool -------------------------------------------------------------------------------------------


def test_a_result_is_of_one_run_only(tmp_path: Path) -> None:
    spec = {"seed": 0}
    assert one.result(tmp_path, spec) is None
    (tmp_path / "result.json").write_text("{")
    assert one.result(tmp_path, spec) is None
    (tmp_path / "result.json").write_text(json.dumps({"spec": spec, "ap": 0.5}))
    assert one.result(tmp_path, spec) == {"spec": spec, "ap": 0.5} and one.result(tmp_path, {"seed": 1}) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--data", "cells"], "NAME=YAML"),
        (["--data", "drawn-shapes=x.yaml"], "NAME=YAML"),
        (["--data", "cells=nothing.yaml"], "nothing.yaml does not exist"),
        (["--page", "nowhere.md"], "nowhere.md cannot be read"),
        (["--profile", "full"], "--profile cpu"),
    ],
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert study.main(arguments) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_the_tool_trains_resumes_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two variants from the data to the page; a failing run is told and done again, and what is done is not."""
    few = (VARIANTS[0], VARIANTS[7])
    for module in (plan, study, page):
        monkeypatch.setattr(module, "VARIANTS", few)
    monkeypatch.setattr(study, "measured", lambda given: {"steps": {v.name: told().costs["steps"][v.name] for v in few}})
    target = tmp_path / "page.md"
    target.write_text(f"mine\n{pages.start(study.TOOL)}\n{pages.END}\nmine too\n")
    command = ["--profile", "quick", "--seeds", "1", "--out", str(tmp_path / "study"), "--page", str(target)]
    place = tmp_path / "study" / "drawn-shapes" / "plain-1-epochs-seed-0"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    assert study.main(command) == 3
    assert "plain-1-epochs-seed-0 failed" in capsys.readouterr().err
    assert "Not complete: 1 of 2" in target.read_text()
    place.unlink()
    other = tmp_path / "study" / "drawn-shapes" / "repvgg-gradient-1-epochs-seed-0" / "result.json"
    before = other.stat().st_mtime_ns
    assert study.main(command) == 0
    assert other.stat().st_mtime_ns == before
    found = json.loads((place / "result.json").read_text())
    assert found["branches_left"] == 0 and found["convolutions"] == json.loads(other.read_text())["convolutions"]
    text = target.read_text()
    assert text.startswith("mine") and text.endswith("mine too\n") and "Not complete" not in text
    assert "latency, ms" in text and (tmp_path / "study" / "study.svg").read_text().startswith("<")
    assert (place / "best_deploy.onnx").exists()


@pytest.mark.slow
def test_ctrl_c_ends_what_is_under_way_and_keeps_what_is_done(tmp_path: Path) -> None:
    """Also where the signal reaches the tool alone, as from a scheduler."""
    command = [sys.executable, str(PAGE.parent.parent / study.TOOL), "--profile", "quick", "--seeds", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("study/*/*/result.json")):
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("study/*/*/result.json")}
    time.sleep(15)  # a run of this size would have ended
    assert done and done == {file: file.stat().st_mtime_ns for file in tmp_path.glob("study/*/*/result.json")}


def test_costs_of_steps(tmp_path: Path) -> None:
    """The measuring process, on two variants."""
    asked = {"batch": 1, "size": 64, "device": "cpu", "threads": 1, "rounds": 2, "models": {}}
    script = (
        "import sys; from pathlib import Path; from rep_backbones.yolo.studies import costs;"
        "costs.VARIANTS = (costs.VARIANTS[0], costs.VARIANTS[7]); costs.main(Path(sys.argv[1]))"
    )
    for variant in (VARIANTS[0], VARIANTS[7]):
        plan.written(plan.detector(variant, QUICK, 3), tmp_path / f"{variant.name}.yaml")
        asked["models"][variant.name] = f"{variant.name}.yaml"
    (tmp_path / "costs.json").write_text(json.dumps({"asked": asked}))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    found = one.read(tmp_path / "costs.json")
    assert found["asked"] == asked and found["steps"][PLAIN]["times"] == [1.0, 1.0]
    assert len(found["steps"]["RepVGG, gradient"]["ms"]) == 2
    assert found["steps"]["RepVGG, gradient"]["memory"] == pytest.approx(1.0, abs=0.01)


def test_latencies_of_files(tmp_path: Path) -> None:
    files = {}
    for name in "ab":
        files[name] = tmp_path / f"{name}.onnx"
        torch.onnx.export(nn.Conv2d(3, 2, 1), (torch.rand(1, 3, 64, 64),), files[name], dynamo=False)
    found = latencies(files, 64, 4)
    assert list(found) == ["a", "b"] and all(each.runs == 4 and each.low_ms > 0 for each in found.values())

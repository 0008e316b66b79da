"""tools/benchmark.py: what is compared is of one deployed form, is measured in turn, and its files come together.

No number of milliseconds is asserted.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from yolo_helpers import built, noise

from rep_backbones import fuse
from rep_backbones.blocks import RepVGGBlock
from rep_backbones.export import charts, svg
from rep_backbones.export.charts import Bar
from rep_backbones.registry import LAYERS
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import benchmark, formats
from rep_backbones.yolo.benchmarks import fusing, inference, results, runtimes, training
from rep_backbones.yolo.benchmarks.inference import FUSED, MULTI, TWIN, Group
from rep_backbones.yolo.benchmarks.results import Findings
from rep_backbones.yolo.training_cost import Cost, plain_twin, step_costs

CPU = torch.device("cpu")
SHORT = ("train", "--quick", "--only", "ConvBNAct")


def files(folder: Path) -> dict[str, str]:
    """What a run wrote, by ending."""
    return {path.suffix: path.read_text() for path in folder.iterdir()}


def rows(text: str) -> list[list[str]]:
    """The cells of all Markdown tables of a page, without their lines of dashes."""
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in found if set(row[0]) != {"-"}]


def drawn(picture: str) -> set[str]:
    return {text for element in ElementTree.fromstring(picture).iter() if (text := (element.text or "").strip())}


# ---- what is compared -----------------------------------------------------------------------------------------------------


def test_the_twin_of_a_detector_has_its_deployed_form_and_norms_only_where_branches_were(tmp_path: Path) -> None:
    model = built(tmp_path).train()
    twin = plain_twin(model)
    layers = len(multi_branch(model))
    assert model.training and layers == 4 and not multi_branch(twin)
    convs, norms = (
        sum(isinstance(m, kind) for m in twin.eval().modules()) for kind in (nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    )
    assert convs == sum(isinstance(m, nn.Conv2d) for m in fuse(model.eval()).modules())
    stock = sum(isinstance(m, Conv) for m in model.modules())
    assert norms == stock + layers, "the head's own convolutions have a bias and no norm"
    deployed = [[m.weight.shape for m in fuse(form).modules() if isinstance(m, nn.Conv2d)] for form in (model, twin)]
    assert deployed[0] == deployed[1]


@pytest.mark.parametrize(("name", "whose"), [(name, whose) for name, those in training.TODAY.items() for whose in those])
def test_the_blocks_of_others_have_as_many_parameters_as_ours(name: str, whose: str) -> None:
    theirs = training.TODAY[name][whose](16)
    assert theirs(torch.rand(1, 16, 8, 8)).shape == (1, 16, 8, 8)
    counts = [sum(p.numel() for p in block.parameters()) for block in (theirs, LAYERS[name].cls(16, 16))]
    assert counts[0] == counts[1] > 0


def test_a_detector_with_its_loss_trains_everything(tmp_path: Path) -> None:
    whole = training.WithLoss(built(tmp_path).train(), 2)
    loss = whole(noise(2))
    assert loss.dim() == 0
    loss.backward()
    assert all(p.grad is not None for p in whole.parameters() if p.requires_grad)


def test_a_step_is_compared_with_the_twins_of_the_same_round() -> None:
    cost, twin = Cost([2.0, 9.0, 3.0], saved=40), Cost([1.0, 6.0, 2.0], saved=30)
    assert cost.times(twin) == [2.0, 1.5, 1.5] and cost.memory(twin) == pytest.approx(4 / 3)
    assert Cost([1.0], 40, peak=50).memory(Cost([1.0], 30, peak=25)) == 2.0


def test_a_loss_is_taken_as_it_is_and_the_input_has_a_gradient_only_if_asked() -> None:
    seen = []

    class Loss(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.requires_grad)
            return super().forward(x).sum()

    layer = Loss(1, 1, 1, bias=False)
    for wanted in (False, True):
        found = step_costs({"a": layer}, torch.ones(1, 1, 2, 2, requires_grad=wanted), repeats=1, warmup=0)
        assert found["a"].peak is None, "on the CPU"
    assert seen == [False, False, True, True]
    assert layer.weight.grad is not None and float(layer.weight.grad) == 4.0, "of the sum, not of its square"


# ---- runtimes -------------------------------------------------------------------------------------------------------------


def test_every_runtime_of_the_cpu_runs_a_network() -> None:
    there, notes = runtimes.at_hand(CPU)
    assert list(there) == ["PyTorch", "ONNX Runtime", "OpenVINO"] and not notes
    calls, failed = runtimes.opened(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.rand(1, 3, 8, 8), there)
    assert list(calls) == list(there) and not failed
    for call in calls.values():
        call()


def test_a_runtime_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "missing", lambda name: f"{name} is not here: pip install {name}")
    there, notes = runtimes.at_hand(CPU)
    assert list(there) == ["PyTorch", "ONNX Runtime"]
    assert notes == ["OpenVINO is not measured: openvino is not here: pip install openvino"]
    assert list(runtimes.at_hand(torch.device("cuda", 0))[0])[:3] == ["PyTorch", "CUDA graph", "torch.compile"]


def test_what_fails_in_one_runtime_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(form: runtimes.Form) -> runtimes.Call:
        raise RuntimeError("no such operator\nand much more")

    def fails_in_use(form: runtimes.Form) -> runtimes.Call:
        return lambda: fails(form)

    monkeypatch.setattr(runtimes, "CPU", {"PyTorch": runtimes._eager, "A": fails, "B": fails_in_use})
    forms = {MULTI: network, FUSED: lambda: network(FUSED)}
    monkeypatch.setattr(inference, "GROUPS", (Group("mine", forms, {}, 16, {"cpu": (1,)}),))
    assert benchmark.main(["infer", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = files(tmp_path)[".md"]
    assert rows(text)[0] == ["network", "PyTorch, ms", "of fused"]
    for name in ("A", "B"):
        assert f"- mine, fused, batch 1, does not run in {name}: RuntimeError: no such operator\n" in text


def test_a_gap_of_the_table_is_empty() -> None:
    found = [inference.Row("repvgg_a2, fused", "PyTorch", 224, 8, [2.0], [1.0])]
    found += [
        inference.Row("resnet50", key, 224, 8, [3.0], [1.5] if key == "PyTorch" else []) for key in ("PyTorch", "Other")
    ]
    assert rows(inference._text(found))[1:] == [
        ["repvgg_a2, fused", "2.0", "1.00 (1.00 to 1.00)", "", ""],
        ["resnet50", "3.0", "1.50 (1.50 to 1.50)", "3.0", ""],
    ]


@pytest.mark.gpu
def test_every_runtime_of_a_gpu_runs_a_network() -> None:
    there, _ = runtimes.at_hand(torch.device("cuda", 0))
    calls, failed = runtimes.opened(RepVGGBlock(8, 8).eval(), torch.rand(2, 8, 16, 16, device="cuda"), there)
    assert list(calls) == list(there) and not failed
    for call in calls.values():
        call()


@pytest.mark.gpu
def test_a_step_on_a_gpu_has_a_peak() -> None:
    layer = RepVGGBlock(8, 8).cuda().train()
    cost = step_costs({"a": layer}, torch.rand(2, 8, 16, 16, device="cuda", requires_grad=True), repeats=1)["a"]
    assert cost.peak is not None and cost.peak > cost.saved > 0


# ---- the pages ------------------------------------------------------------------------------------------------------------


def test_train_writes_a_page_data_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--quick", "--device", "cpu", "--only", "RepConv*", "--repeats", "2", "--out", str(tmp_path)]
    assert benchmark.main(command) == 0
    made = files(tmp_path)
    assert made.keys() == {".md", ".json", ".svg"} and len({path.stem for path in tmp_path.iterdir()}) == 1
    stem = next(tmp_path.iterdir()).stem
    assert stem.endswith("-train") and f"]({stem}.svg)" in made[".md"]
    assert "python tools/benchmark.py train --quick --device cpu --only 'RepConv*'" in made[".md"]
    assert results.WARNING in made[".md"] and re.search(r"on 20\d\d-\d\d-\d\d with python", made[".md"])
    header, *table = rows(made[".md"])
    assert header == ["layer", "of", "time, 1 x 8 x 8", "memory", "steps"]
    wanted = [(name, whose) for name in ("RepConv", "RepConvN") for whose in ("this package", "Ultralytics")]
    assert [(row[0], row[1]) for row in table] == wanted and [row[-1] for row in table] == ["2"] * 4
    found = json.loads(made[".json"])
    assert found["quick"] and found["command"].startswith("python tools/benchmark.py train") and "torch" in found["versions"]
    first = found["rows"][0]
    assert len(first["cost"]["seconds"]) == len(first["twin"]["seconds"]) == len(first["times"]) == 2
    assert first["times"][0] == first["cost"]["seconds"][0] / first["twin"]["seconds"][0]
    assert {"RepConv", "RepConvN, Ultralytics", "time, 1 x 8 x 8", "memory", "1"} <= drawn(made[".svg"])
    told = capsys.readouterr()
    assert made[".md"].splitlines()[0] in told.out and "layers: 100%" in told.err


def test_a_block_of_repvgg_stands_beside_its_floor_too(tmp_path: Path) -> None:
    command = ["train", "--quick", "--device", "cpu", "--only", "RepVGGBlock", "--repeats", "2", "--out", str(tmp_path)]
    assert benchmark.main(command) == 0
    made = files(tmp_path)
    _, *table = rows(made[".md"])
    assert [row[1] for row in table] == ["this package", "timm", training.FLOOR, training.OF_FLOOR]
    ours, _, floor, beside = json.loads(made[".json"])["rows"]
    assert beside["twin"] == floor["cost"] and beside["cost"] == ours["cost"] and floor["twin"] == ours["twin"]
    assert "holds multiples of the floor's instead, conv + BN + ReLU and one 1x1 conv, summed" in made[".md"]
    layer = training.FLOORS["RepVGGBlock"](8)
    kinds = [type(module) for module in layer.modules() if not list(module.children())]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.ReLU]


def test_train_of_detectors_and_what_cannot_be_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, branched = built(tmp_path, "Conv").train(), built(tmp_path).train()
    monkeypatch.setattr(
        training, "DETECTORS", {"tiny": lambda notes: notes.append("a note") or {TWIN: plain, "x": branched}}
    )
    assert benchmark.main(["train", "--quick", "--only", "tiny", "--out", str(tmp_path / "out")]) == 0
    made = files(tmp_path / "out")
    header, row = rows(made[".md"])
    assert header == ["detector", "step, ms", "twin's, ms", "time", "memory, 1 x 3 x 64", "steps"] and row[0] == "x"
    assert made[".md"].endswith("- a note\n") and "time, whole detector" in drawn(made[".svg"])


def test_the_expansions_of_yolo11n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small detector stands for it."""
    monkeypatch.setattr(training, "YOLO", lambda name: SimpleNamespace(model=built(tmp_path, "Conv")))
    monkeypatch.setattr(training, "ours", lambda: ["BepC3", "RepConvN"])
    notes: list[str] = []
    forms = training.DETECTORS["yolo11n"](notes)
    assert list(forms) == [TWIN, "yolo11n + RepConvN"] and notes == ["not for `expand`, so not in yolo11n: BepC3"]
    assert len(multi_branch(forms["yolo11n + RepConvN"])) > len(multi_branch(forms[TWIN])) == 0


def network(form: str = MULTI) -> nn.Module:
    block = nn.Sequential(RepVGGBlock(3, 4)).eval()
    return block if form == MULTI else fuse(block)


def test_infer_writes_each_network_in_each_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {MULTI: network, FUSED: lambda: network(FUSED), TWIN: lambda: network(TWIN)}
    group = Group("mine", forms, {"theirs": network}, 16, {"cpu": (2, 3)})
    monkeypatch.setattr(inference, "GROUPS", (group,))
    monkeypatch.setitem(inference.PLANS, "cpu", inference.Plan(3, 60.0))
    assert benchmark.main(["infer", "--device", "cpu", "--out", str(tmp_path)]) == 0
    made = files(tmp_path)
    assert "## mine, batch 2, 16 x 16 pixels, 3 runs" in made[".md"] and "batch 3" in made[".md"]
    header, *table = rows(made[".md"])[:5]
    assert header == ["network", *(c for key in runtimes.CPU for c in (f"{key}, ms", "of fused"))]
    assert [row[0] for row in table] == ["mine, multi-branch", "mine, fused", "mine, plain twin", "theirs"]
    assert table[1][2::2] == ["1.00 (1.00 to 1.00)"] * 3
    found = json.loads(made[".json"])
    assert not found["quick"] and len(found["rows"]) == 4 * 3 * 2
    assert {"mine, multi-branch, batch 2", "theirs, batch 3", "OpenVINO"} <= drawn(made[".svg"])
    assert results.WARNING not in made[".md"]


def test_the_forms_of_a_detector_and_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones stand for those that are measured."""
    monkeypatch.setattr(inference, "_yolo", lambda name: built(tmp_path))
    monkeypatch.setattr(inference, "create_backbone", partial(inference.create_backbone, width=0.2, depth=0.2))
    for make, name in ((inference._detector, "efficientrep-n"), (inference._classifier, "repvgg_a0")):
        multi, fused, twin = (make(name, form) for form in (MULTI, FUSED, TWIN))
        shapes = [[m.weight.shape for m in form.modules() if isinstance(m, nn.Conv2d)] for form in (multi, fused, twin)]
        assert shapes[1] == shapes[2] and len(shapes[0]) > len(shapes[1])
        for form in (fused, twin):
            assert not any(isinstance(m, nn.BatchNorm2d) for m in form.modules() if vars(m).get("eps") != 0), name
    assert not any(isinstance(m, nn.BatchNorm2d) for m in inference._resnet("resnet18").modules())


def test_without_a_word_fusing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        fusing, "rows", lambda jobs, n: asked.append((jobs, n)) or [("fuse, seconds", [1.0, 3.0, 2.0], "under 5")]
    )
    assert benchmark.main(["--out", str(tmp_path)]) == 0
    text = next(tmp_path.glob("*-fuse.md")).read_text()
    assert "| fuse, seconds | 2.00 | 1.00 to 3.00 | 3 | under 5 |" in text and not list(tmp_path.glob("*.svg"))
    assert asked == [([*fusing.JOBS, *fusing.PAIRS], 5)]
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["rows"][0]["values"] == [1.0, 3.0, 2.0]
    assert benchmark.main(["fuse", "--quick"]) == 0 and asked[1] == (list(fusing.QUICK), 1)


def test_jobs_and_pairs_run_in_processes_of_their_own_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(fusing, "_python", lambda *command: ran.append(command[-1]) or '{"fuse RepVGG-B3, seconds": 2.5}')
    first, alone, both = fusing.rows(["fuse", "imports"], 2)
    assert first == ("fuse RepVGG-B3, seconds", [2.5, 2.5], "under 5") and ran[:2] == ["fuse", "fuse"]
    assert ran[2:] == ["from ultralytics import YOLO", "from ultralytics import YOLO; import rep_backbones"] * 2
    assert (len(alone[1]), alone[2], len(both[1]), both[2]) == (2, "", 2, "at most 0.3 s more")


@pytest.mark.slow
def test_a_job_of_the_command_line() -> None:
    ((name, values, promise),) = fusing.rows(["expand"], 1)
    assert name.startswith("expand YOLO11n by") and values[0] > 0 and promise == "under 3"


def test_fused_in_the_benchmark_is_repvgg_b3() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in fusing.repvgg_b3().parameters()) == 123_085_288 - 2_561_000, "without the classifier"


# ---- files and messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_run_that_does_not_end_leaves_the_old_files(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark.WORDS, "train", lambda *_: Findings("Old", "text", [{"a": 1}]))
    assert benchmark.main(["train", "--out", str(tmp_path)]) == 0
    before = files(tmp_path)

    def fails(*_: object) -> Findings:
        raise error

    monkeypatch.setitem(benchmark.WORDS, "train", fails)
    assert benchmark.main(["train", "--out", str(tmp_path)]) == (130 if isinstance(error, KeyboardInterrupt) else 3)
    assert files(tmp_path) == before
    monkeypatch.setattr(results, "page", fails)
    monkeypatch.setitem(benchmark.WORDS, "train", lambda *_: Findings("New", "text", [{"a": 2}]))
    assert benchmark.main(["train", "--out", str(tmp_path)]) != 0
    assert files(tmp_path) == before, "none of the new files without the others"
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--only", "Nope"], "--only Nope matches nothing; there are ACBlock"),
        (["infer", "--only", "Nope"], "--only Nope matches nothing; there are efficientrep-n, repvgg_a2, repvgg_b1g4"),
        (["fuse", "--only", "Nope"], "--only Nope matches nothing; there are fuse"),
        ([*SHORT, "--device", "99"], "--device 99: "),
        ([*SHORT, "--device", "tpu"], "--device tpu is not known; accepted are cpu"),
        ([*SHORT, "--repeats", "0"], "--repeats 0 is not accepted"),
        ([*SHORT, "--out", "file/there"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_names_of_files_hold_no_folders() -> None:
    assert results.stem("infer", "Quadro RTX 6000/8000, 2 cores") == "quadro-rtx-6000-8000-2-cores-infer"


def test_dots_are_named_and_a_picture_alone_needs_no_page() -> None:
    found = [("first", [Bar("time", 2.0, 1.5, 3.0, 0), Bar("memory", 1.2, hue=7)]), ("second", [Bar("time", 4.0, hue=0)])]
    inside = charts.dots(found, "multiples", mark=1.0)
    assert "var(--hue7)" in inside
    picture = svg.alone(inside)
    assert "var(" not in picture and "#2f6fe0" in picture and 'height="100%" fill="#ffffff"/>' in picture
    assert {"first", "second", "time", "memory", "multiples", "1", "1.5", "3"} <= drawn(picture)
    wide = drawn(charts.dots([("a", [Bar("ms", 0.04, hue=0), Bar("ms", 60.0, hue=0)])], "milliseconds"))
    assert {"0.05", "10", "50"} <= wide and not {"1.5", "15"} & wide

"""Each task of Ultralytics on a trunk of ours: trained by its trainer, fused, exported and proved; what it can't is said."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import ultralytics
from test_fuse_export import files, saved
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import ASSETS
from yolo_helpers import make_data, model_yaml, noise, randomize_norms, train_args

import rep_backbones
from rep_backbones.export.onnx_model import OnnxModel
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import eval_coco
from rep_backbones.yolo.backends import model_predictor, predictor
from rep_backbones.yolo.checkpoint import load_precise
from rep_backbones.yolo.coco_ap import TASKS, detections
from rep_backbones.yolo.fuse_export import run
from rep_backbones.yolo.fuse_export_cli import main
from rep_backbones.yolo.proof import Outputs
from rep_backbones.yolo.trainer import TRAINERS

# what the ONNX file of each gives for two pictures of 64 pixels: 4 sides and 3 classes of 80 cells, and what the task adds
SHAPES = {
    "detect": [(7, 80)],
    "segment": [(7 + 4, 80), (4, 16, 16)],
    "pose": [(7 + 3, 80)],
    "obb": [(7 + 1, 80)],
    "classify": [(3,)],
}


def test_all_tasks_with_a_trunk_are_here() -> None:
    assert SHAPES.keys() == TRAINERS.keys()


@pytest.mark.parametrize("task", SHAPES)
def test_every_task_trains_fuses_and_exports(tmp_path: Path, task: str) -> None:
    data = make_data(tmp_path / "data", task)
    model = YOLO(str(model_yaml(tmp_path, task=task)))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    model.train(trainer=TRAINERS[task], **train_args(data, tmp_path, epochs=1))
    assert isinstance(model.trainer, TRAINERS[task])
    folder = tmp_path / "run" / "weights"
    assert files(folder) == {"best.pt", "best_deploy.pt", "best_fp32.pt", "last.pt"}
    (row,) = csv.DictReader((tmp_path / "run" / "branches.csv").read_text().splitlines())
    assert 0 <= float(row["fuse_error"]) < 1e-5

    trained = load_precise(folder / "best.pt")
    branches = {name for name, value in before.items() if ".branches." in name and value.dim() == 4}
    after = trained.model.state_dict()
    assert branches and not [name for name in branches if torch.equal(after[name], before[name])], "each branch has learned"

    outcome = run(folder / "best.pt", formats=("onnx",), batch=2, latency=False)
    counts = outcome.report.counts
    assert outcome.status == 0 and outcome.report.failures == []
    assert (counts["before"].multi_branch_layers, counts["after"].multi_branch_layers) == (4, 0)
    graph = OnnxModel(outcome.artifacts["onnx"])
    assert [tuple(output.shape) for output in graph(noise(2))] == [(2, *shape) for shape in SHAPES[task]]
    assert graph.metadata["task"] == task


@pytest.mark.parametrize("task", SHAPES)
def test_every_tasks_outputs_are_the_fused_ones(tmp_path: Path, task: str) -> None:
    """With random statistics, which a wrong kernel can't hide behind; by our fuse and by what Ultralytics itself calls."""
    model = load_precise(saved(tmp_path, task, loud=task != "classify")).model.eval()
    fused = rep_backbones.fuse(model)
    assert multi_branch(model) and not multi_branch(fused)
    report = rep_backbones.verify(Outputs(model), Outputs(fused), [noise(2)])
    proto = "1.2" if ultralytics.__version__.startswith("8.3.") else "1.proto"
    names = {"detect": [], "segment": ["extra", proto], "pose": ["extra"], "obb": ["extra"], "classify": []}
    assert report.ok and {each.name for each in report.differences} >= set(names[task]), report
    assert not multi_branch(model.fuse(verbose=False))


def test_a_model_of_a_task_is_made_of_any_yaml_here(tmp_path: Path) -> None:
    """A trunk and neck of this package under the head of another task."""
    config = tasks.yaml_model_load("efficientrep-n.yaml")
    config["scales"]["n"] = [0.33, 0.125, 1024]
    config["head"][-1][2:] = ["Segment", ["nc", 8, 16]]
    model = randomize_norms(tasks.SegmentationModel(config, verbose=False)).eval()
    assert rep_backbones.verify(Outputs(model), Outputs(rep_backbones.fuse(model)), [noise(1)]).ok


# ---- AP ----------------------------------------------------------------------------------------------------------------


def speaking(folder: Path) -> Path:
    """A segmenter with boxes of two cells a side, of which NMS keeps many, and mask coefficients larger than its scores."""
    weights = saved(folder, "segment", loud=True)
    content = torch.load(weights, weights_only=False)
    head = content["model"].model[-1]
    with torch.no_grad():
        for box, mask in zip(head.cv2, head.cv4):
            box[-1].weight.zero_()
            box[-1].bias.copy_(10.0 * (torch.arange(64) % 16 == 1))
            mask[-1].bias.fill_(5.0)
    torch.save(content, weights)
    return weights


def test_mask_coefficients_are_no_classes(tmp_path: Path) -> None:
    """The boxes of a segmenter are those that Ultralytics finds, without NMS in the file and with it."""
    weights = speaking(tmp_path)
    run(weights, formats=("onnx",), latency=False)
    graph = predictor(tmp_path / "best_deploy.onnx")
    run(weights, formats=("onnx",), latency=False, nms=True, out=tmp_path / "nms")
    rows = predictor(tmp_path / "nms" / "best_deploy.onnx")
    picture = ASSETS / "bus.jpg"
    stock = YOLO(str(tmp_path / "best_deploy.pt")).predict(picture, imgsz=64, rect=False, conf=0.25, verbose=False)[0].boxes
    expected = stock.data[stock.data[:, 4].argsort(descending=True)]
    assert len(expected) > 5
    for predict in (model_predictor(load_precise(weights).model), graph, rows):
        found = torch.tensor(list(detections(predict, picture, 64, 0.25, nc=3)))
        assert found.shape == expected.shape
        assert torch.allclose(found[:, 4], expected[:, 4], atol=1e-4) and torch.equal(found[:, 5], expected[:, 5])


@pytest.mark.parametrize("task", sorted(SHAPES.keys() - set(TASKS)))
def test_ap_of_other_tasks_is_refused_with_what_to_do(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path, task)
    data = make_data(tmp_path / "data")
    assert main([str(weights), "--data", str(data)]) == 2
    told = capsys.readouterr().err
    assert f"this is one of the task {task}" in told and f"yolo {task} val model=best_deploy.onnx data=..." in told
    assert files(tmp_path) == {"best.pt", "data"}, "nothing was made"
    run(weights, formats=("onnx",), latency=False)
    for name in ("best.pt", "best_deploy.onnx"):
        assert eval_coco.main([str(tmp_path / name), "--data", str(data)]) == 2
        assert f"yolo {task} val model={tmp_path / name} data=..." in capsys.readouterr().err


def test_a_classifier_has_no_boxes_to_suppress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved(tmp_path, "classify")), "--nms"]) == 2
    assert "--nms suppresses boxes, and a classifier gives none" in capsys.readouterr().err
    assert files(tmp_path) == {"best.pt"}

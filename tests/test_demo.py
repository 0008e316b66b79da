"""The drawn data set, evaluation by pycocotools, and the demonstration on a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from rep_backbones.yolo import demo, shapes
from rep_backbones.yolo.coco_ap import coco_ap, detections
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.gallery import gallery

SIZE = 96


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.make_shapes(folder, train=6, val=12, size=SIZE)
    return folder


def truth(folder: Path, part: str = "val") -> dict[str, list[dict]]:
    return json.loads((folder / "annotations" / f"instances_{part}.json").read_text())


def test_same_pictures_for_the_same_seed(tmp_path: Path, drawn: Path) -> None:
    again = shapes.make_shapes(tmp_path, train=6, val=12, size=SIZE).parent
    other = shapes.make_shapes(tmp_path / "other", train=6, val=12, size=SIZE, seed=1).parent
    first = "images/val/0000.jpg"
    assert (again / first).read_bytes() == (drawn / first).read_bytes() != (other / first).read_bytes()
    assert truth(again) == truth(drawn)


def test_yolo_and_coco_forms_agree(drawn: Path) -> None:
    for part in ("train", "val"):
        coco = truth(drawn, part)
        for image in coco["images"]:
            boxes = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            lines = (drawn / "labels" / part / image["file_name"].replace(".jpg", ".txt")).read_text().splitlines()
            assert len(lines) == len(boxes) > 0
            for line, annotation in zip(lines, boxes):
                kind, cx, cy, w, h = map(float, line.split())
                x, y, width, height = annotation["bbox"]
                assert kind == annotation["category_id"] - 1
                expected = np.array([x + width / 2, y + height / 2, width, height]) / SIZE
                assert np.allclose([cx, cy, w, h], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", range(len(shapes.NAMES)), ids=shapes.NAMES)
def test_box_fits_the_shape(kind: int) -> None:
    picture = np.zeros((60, 60, 3), np.float32)
    shapes._shape(picture, kind, (10.0, 20.0, 25.0, 25.0), (255.0, 255.0, 255.0))
    rows, columns = np.nonzero(picture[:, :, 0] > 127)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(found - [10, 20, 35, 45]).max() <= 1


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": 10}], ids=str)
def test_bad_numbers_are_told(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one picture each, and 64 pixels"):
        shapes.make_shapes(tmp_path, **wrong)


def oracle(folder: Path, shift: float = 0.0, wrong_class: bool = False):
    """A detector that knows the answers, picture by picture."""
    coco = truth(folder)
    answers = iter(coco["images"])

    def predict(x: Tensor) -> Tensor:
        image = next(answers)
        boxes = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        out = torch.zeros(1, 4 + len(shapes.NAMES), len(boxes))
        for index, annotation in enumerate(boxes):
            left, top, w, h = annotation["bbox"]
            out[0, :4, index] = torch.tensor([left + w / 2 + shift * w, top + h / 2, w, h])
            out[0, 4 + (annotation["category_id"] - 1 + wrong_class) % 3, index] = 0.9
        return out

    return predict


@pytest.mark.parametrize(
    ("changes", "ap50", "ap"),
    [
        ({}, 1.0, 1.0),
        ({"shift": 0.2}, 1.0, 0.4),  # IoU 0.8 / 1.2 = 0.667: right at the four thresholds 0.50 to 0.65 of ten
        ({"shift": 0.4}, 0.0, 0.0),  # IoU 0.6 / 1.4 = 0.429
        ({"wrong_class": True}, 0.0, 0.0),
    ],
    ids=["exact", "shifted by 0.2", "shifted by 0.4", "wrong class"],
)
def test_ap_of_known_answers(drawn: Path, changes: dict, ap50: float, ap: float) -> None:
    names = dict(enumerate(shapes.NAMES))
    found = coco_ap(oracle(drawn, **changes), open_data(drawn), names=names, size=SIZE)
    assert found.ap50 == pytest.approx(ap50, abs=0.02) and found.ap == pytest.approx(ap, abs=0.02)


def test_classes_of_another_data_set_are_told(drawn: Path) -> None:
    with pytest.raises(ValueError, match="has the classes circle, square, triangle; the detector has cat"):
        coco_ap(oracle(drawn), open_data(drawn), names={0: "cat"}, size=SIZE)


def test_boxes_are_in_the_pixels_of_the_picture(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((100, 200, 3), np.uint8))
    middle = torch.tensor([[[48.0], [48.0], [96.0], [48.0], [0.9]]])  # the whole picture, letterboxed to 96 x 96
    assert next(detections(lambda x: middle, tmp_path / "wide.png", 96, nc=1))[:4] == pytest.approx([0, 0, 200, 100], abs=1)


def test_gallery_draws_every_box(drawn: Path, tmp_path: Path) -> None:
    paths = sorted((drawn / "images" / "val").glob("*.jpg"))[:3]
    count = sum(a["image_id"] < 3 for a in truth(drawn)["annotations"])
    drawn_boxes = gallery(
        oracle(drawn), paths, tmp_path / "all.png", names=dict(enumerate(shapes.NAMES)), size=SIZE, columns=2, tile=(80, 80)
    )
    assert drawn_boxes == count
    assert cv2.imread(str(tmp_path / "all.png")).shape == (160, 160, 3)


def test_demo_on_a_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, too short to learn anything; `make demo` shows that it does."""
    monkeypatch.setattr(demo, "SIZE", 64)
    monkeypatch.setitem(demo.TRAINING, "imgsz", 64)
    monkeypatch.setitem(demo.TRAINING, "workers", 0)
    assert demo.demo(tmp_path, epochs=1, train=8, val=8) == 0
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["multi-branch", "fused", "ONNX"]
    assert table.splitlines()[2].split("|")[2].strip() == "114" and table.splitlines()[4].split("|")[2].strip() == "79"
    made = {path.name for path in tmp_path.iterdir()}
    assert {"best_deploy.pt", "best_deploy.onnx", "best_deploy_report.json", "detections.png"} <= made
    assert "training: 100%" in capsys.readouterr().err
    monkeypatch.setitem(demo.TRAINING, "epochs", 1)
    assert demo.demo(tmp_path / "again", epochs=1, train=8, val=8) == 3, "what has learned nothing is no success"
    assert "where 0.8 is to be expected" in capsys.readouterr().err

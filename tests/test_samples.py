"""What is drawn into the report's pictures, for outputs made by hand: expected corners typed in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from rep_backbones.yolo.samples import first, samples

ANCHORS = 80  # of 64 x 64 pixels at strides 8 and 16
NAMES = {0: "disc", 1: "box"}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """32 pixels wide and 16 high: letterboxed to 64 x 64 it is twice as large, 16 pixels below the top."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((16, 32, 3), np.uint8))
    return tmp_path / "a.png"


def predictions(*rows: list[float]) -> Tensor:
    """(1, channels, anchors): the rows first, the rest without a score."""
    made = torch.zeros(1, len(rows[0]), ANCHORS)
    made[0, :, : len(rows)] = torch.tensor(rows).T
    return made


def boxes(picture: Path, output: Any, task: str = "detect", **changes: Any) -> list[Any]:
    settings: dict[str, Any] = {"task": task, "names": NAMES, "size": (64, 64), "strides": [8, 16], **changes}
    return list(samples({"onnx": first(output)}, [picture], **settings)[0].found[0].boxes)


def test_a_box_in_the_picture_s_pixels(picture: Path) -> None:
    (box,) = boxes(picture, [predictions([32, 32, 16, 8, 0.1, 0.9])])
    assert box.corners == [(12, 6), (20, 6), (20, 10), (12, 10)] and box.name == "box"
    assert box.score == pytest.approx(0.9)


def test_channels_behind_the_classes_are_no_scores(picture: Path) -> None:
    (box,) = boxes(picture, (predictions([32, 32, 16, 8, 0.8, 0.0, 7.0, 9.0]), None), "pose")
    assert (box.name, box.score) == ("disc", pytest.approx(0.8))


def test_a_turned_box(picture: Path) -> None:
    (box,) = boxes(picture, predictions([32, 32, 16, 8, 0.9, 0.0, math.pi / 2]), "obb")
    xs, ys = zip(*box.corners)
    assert (min(xs), max(xs), min(ys), max(ys)) == pytest.approx((14, 18, 4, 12), abs=1e-4), "higher than wide"


@pytest.mark.parametrize("rest", [[], [5.0, 5.0, 0.9]], ids=["boxes", "keypoints"])
def test_final_rows(picture: Path, rest: list[float]) -> None:
    rows = torch.zeros(1, 300, 6 + len(rest))
    rows[0, 0] = torch.tensor([24, 28, 40, 36, 0.9, 1.0, *rest])
    (box,) = boxes(picture, rows)
    assert box.corners == [(12, 6), (20, 6), (20, 10), (12, 10)] and box.name == "box"


def test_more_channels_than_anchors_are_predictions_all_the_same(picture: Path) -> None:
    many = {index: str(index) for index in range(90)}
    (box,) = boxes(picture, predictions([32, 32, 16, 8, *[0.0] * 89, 0.9]), names=many)
    assert box.name == "89"


def test_the_best_boxes_are_shown_and_the_rest_counted(picture: Path) -> None:
    rows = torch.zeros(1, 300, 6)
    for index in range(50):
        rows[0, index] = torch.tensor([index, 0, index + 1, 64, 0.3 + index / 100, 0])
    found = samples({"onnx": rows}, [picture], task="detect", names=NAMES, size=(64, 64))[0].found[0]
    assert len(found.boxes) == 40 and found.more == 10
    assert found.boxes[0].score == pytest.approx(0.79), "best first"


def test_the_likeliest_classes(picture: Path) -> None:
    scores = torch.tensor([[0.2, 0.1, 0.7]])
    found = samples({"pt": scores}, [picture], task="classify", names=NAMES, size=(64, 64))[0].found[0]
    assert [(name, round(score, 3)) for name, score in found.classes] == [("2", 0.7), ("disc", 0.2), ("box", 0.1)]


def test_each_picture_has_its_own(picture: Path) -> None:
    other = picture.with_name("b.png")
    cv2.imwrite(str(other), np.full((64, 64, 3), 255, np.uint8))
    one, two = predictions([32, 32, 16, 8, 0.1, 0.9]), predictions([32, 32, 16, 8, 0.9, 0.1])
    made = samples(
        {"trained": torch.cat([one, two]), "onnx": torch.cat([two, one])},
        [picture, other],
        task="detect",
        names=NAMES,
        size=(64, 64),
        strides=[8, 16],
    )
    assert [[found.boxes[0].name for found in sample.found] for sample in made] == [["box", "disc"], ["disc", "box"]]
    assert [sample.name for sample in made] == ["a.png", "b.png"] and made[0].size == (32, 16)
    assert cv2.imdecode(np.frombuffer(made[0].jpeg, np.uint8), 1).shape == (16, 32, 3)

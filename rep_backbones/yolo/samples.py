"""What two forms of a model find in the same pictures, for the report: boxes, or the likeliest classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes, xywhr2xyxyxyxy

from rep_backbones.export.html import Box, Found, Sample

CONFIDENCE = 0.25  # of the boxes that are shown, as `yolo predict` does
IOU, MOST, SHOWN = 0.7, 300, 40  # as `yolo predict`; and boxes that can still be told apart
SIDE = 800  # pixels of the larger side of a picture in the report
CLASSES = 5


def samples(
    found: Mapping[str, Tensor],
    paths: Sequence[Path],
    *,
    task: str,
    names: Mapping[int, str],
    size: Sequence[int],
    strides: Sequence[int] = (8, 16, 32),
) -> list[Sample]:
    """The pictures with what was found in them.

    Args:
        found: the predictions of each form, `(n, 4 + nc + rest, anchors)`, or final rows `(n, k, 6 + rest)`, or scores
            `(n, nc)` of a classifier, by the form's key in the report's artifacts.
        paths: the n pictures.
        names: of the classes, by index.
        size: (height, width) in pixels that pictures were letterboxed to.
        strides: of the head's levels; their cells tell predictions from final rows.
    """
    anchors = sum((size[0] // stride) * (size[1] // stride) for stride in strides)
    made = []
    for place, path in enumerate(paths):
        picture: Any = cv2.imread(str(path))
        shape = picture.shape[:2]
        scale = min(SIDE / max(shape), 1.0)
        shown = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        each = []
        for form, outputs in found.items():
            output = outputs[place : place + 1]
            if task == "classify":
                each.append(Found(form, classes=_likeliest(output[0], names)))
            else:
                boxes = _boxes(output, output.shape[2] != anchors, task, names, size, shape, scale)
                each.append(Found(form, boxes[:SHOWN], more=len(boxes[SHOWN:])))
        made.append(Sample(path.name, jpeg, (shown.shape[1], shown.shape[0]), each))
    return made


def first(output: Any) -> Tensor:
    """The predictions, of what a model gives: they come first."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _likeliest(scores: Tensor, names: Mapping[int, str]) -> list[tuple[str, float]]:
    values, places = scores.flatten().topk(min(CLASSES, scores.numel()))
    return [(_name(names, place), value) for value, place in zip(values.tolist(), places.tolist())]


def _boxes(
    output: Tensor,
    rows: bool,
    task: str,
    names: Mapping[int, str],
    size: Sequence[int],
    shape: tuple[int, int],
    scale: float,
) -> list[Box]:
    """Of predictions `(1, 4 + nc + rest, anchors)` or of `rows` `(1, k, 6 + rest)`; best first, in the shown picture."""
    rotated = task == "obb"
    found = non_max_suppression(output, CONFIDENCE, IOU, max_det=MOST, nc=len(names), rotated=rotated, end2end=rows)[0]
    found = found[found[:, 4].argsort(descending=True)]
    found[:, :4] = scale_boxes((size[0], size[1]), found[:, :4], shape, xywh=rotated) * scale
    if rotated:
        corners = xywhr2xyxyxyxy(torch.cat([found[:, :4], found[:, -1:]], 1))  # (k, 4, 2)
    else:
        corners = found[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)
    kinds, scores = found[:, 5].int().tolist(), found[:, 4].tolist()
    return [
        Box([(x, y) for x, y in points], _name(names, kind), score)
        for points, kind, score in zip(corners.tolist(), kinds, scores)
    ]


def _name(names: Mapping[int, str], index: int) -> str:
    return names.get(index, str(index))

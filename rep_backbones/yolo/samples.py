"""What two forms of a model find in the same pictures, for the report: boxes, or the likeliest classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes, xywhr2xyxyxyxy

from rep_backbones.export.html import Box, Found, Sample
from rep_backbones.yolo.pictures import pictures

Run = Callable[[Tensor], Any]  # (n, c, h, w) in [0, 1] -> what the head predicts, first if it is one of several
CONFIDENCE = 0.25  # of the boxes that are shown, as `yolo predict` does
IOU, MOST, SHOWN = 0.7, 300, 40  # as `yolo predict`; and boxes that can still be told apart
SIDE = 800  # pixels of the larger side of a picture in the report
CLASSES = 5


def samples(
    runs: Mapping[str, Run],
    paths: Sequence[Path],
    *,
    task: str,
    names: Mapping[int, str],
    size: tuple[int, int],
    strides: Sequence[int] = (8, 16, 32),
    channels: int = 3,
    batch: int = 1,
) -> list[Sample]:
    """The pictures with what each of `runs` finds in them.

    Args:
        runs: the forms, by their key in the report's artifacts.
        names: of the classes, by index.
        size: (height, width) in pixels that pictures are letterboxed to.
        strides: of the head's levels; their cells tell predictions from final rows.
        batch: pictures that each run takes at once; the same one is repeated.
    """
    anchors = sum((size[0] // stride) * (size[1] // stride) for stride in strides)
    found = []
    for path in paths:
        x = pictures(size, channels, [path])
        picture: Any = cv2.imread(str(path))
        shape = picture.shape[:2]
        scale = min(SIDE / max(shape), 1.0)
        shown = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        each = []
        for form, run in runs.items():
            with torch.no_grad():
                output = _first(run(x.expand(batch, -1, -1, -1)))[:1].float().cpu()
            if task == "classify":
                each.append(Found(form, classes=_likeliest(output[0], names)))
            else:
                boxes = _boxes(output, output.shape[2] != anchors, task, names, size, shape, scale)
                each.append(Found(form, boxes[:SHOWN], more=len(boxes[SHOWN:])))
        found.append(Sample(path.name, jpeg, (shown.shape[1], shown.shape[0]), each))
    return found


def _first(output: Any) -> Tensor:
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
    size: tuple[int, int],
    shape: tuple[int, int],
    scale: float,
) -> list[Box]:
    """Of predictions `(1, 4 + nc + rest, anchors)` or of `rows` `(1, k, 6 + rest)`; best first, in the shown picture."""
    rotated = task == "obb"
    found = non_max_suppression(output, CONFIDENCE, IOU, max_det=MOST, nc=len(names), rotated=rotated, end2end=rows)[0]
    found = found[found[:, 4].argsort(descending=True)]
    found[:, :4] = scale_boxes(size, found[:, :4], shape, xywh=rotated) * scale
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

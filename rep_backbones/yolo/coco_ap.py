"""Average precision of a detector by pycocotools: the same pictures, preparation and NMS for every form of a model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from rep_backbones.yolo.pictures import pictures

Predict = Callable[[Tensor], Tensor]  # (n, 3, h, w) in [0, 1] -> (n, 4 + nc, anchors): boxes as centre and size, and scores


@dataclass(frozen=True)
class AP:
    """COCO's averages over the classes: at IoU 0.50:0.95, at 0.50, and at 0.75, each in [0, 1]."""

    ap: float
    ap50: float
    ap75: float


def coco_ap(
    predict: Predict, annotations: Path, images: Path, *, names: Mapping[int, str], size: int, title: str = ""
) -> AP:
    """Evaluate a detector on a data set in COCO form.

    Args:
        predict: the detector without NMS.
        annotations: COCO's JSON; its categories are found by name.
        images: the folder that its file names are relative to.
        names: of the detector's classes, by index.
        size: height and width in pixels that pictures are letterboxed to.
        title: of the progress bar; none if empty.

    Raises:
        ValueError: the data set has none of the classes, or a picture is missing.
    """
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    by_name = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    category = {index: by_name[name] for index, name in names.items() if name in by_name}
    if not category:
        raise ValueError(f"{annotations} has the classes {', '.join(by_name)}; the detector has {', '.join(names.values())}")
    results = []
    entries = truth.dataset["images"]
    for entry in tqdm(entries, desc=title, disable=not title):
        for *box, score, kind in detections(predict, images / entry["file_name"], size):
            if int(kind) in category:
                x1, y1, x2, y2 = box
                results.append(
                    {
                        "image_id": entry["id"],
                        "category_id": category[int(kind)],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": score,
                    }
                )
    if not results:
        return AP(0.0, 0.0, 0.0)
    with redirect_stdout(io.StringIO()):
        evaluation: Any = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return AP(*(float(value) for value in evaluation.stats[:3]))


def detections(predict: Predict, picture: Path, size: int, confidence: float = 0.001) -> Iterator[list[float]]:
    """What is detected in a picture: x1, y1, x2, y2 in its own pixels, score and class index."""
    batch = pictures((size, size), paths=[picture])
    shape = np.asarray(cv2.imread(str(picture))).shape[:2]
    with torch.no_grad():
        found = non_max_suppression(predict(batch), conf_thres=confidence, iou_thres=0.7, max_det=300)[0]
    found[:, :4] = scale_boxes((size, size), found[:, :4], shape)
    yield from found[:, :6].tolist()

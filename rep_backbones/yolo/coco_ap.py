"""Average precision of a detector by pycocotools: the same pictures, preparation and NMS for every form of a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from rep_backbones.export.files import replacing
from rep_backbones.yolo.dataset import DataSet
from rep_backbones.yolo.pictures import pictures

TASKS = ("detect", "segment")  # whose first outputs are upright boxes, and whose labels `dataset` reads

# (n, 3, h, w) in [0, 1] -> (n, 4 + nc + rest, anchors), boxes as centre and size, scores, and what else the task has; or
# final rows (n, k, 6 + rest)
Predict = Callable[[Tensor], Tensor]
Found = np.ndarray[Any, Any]  # (rows, 7): picture, x, y, width, height, score, category


@dataclass(frozen=True)
class AP:
    """COCO's averages over the classes, each in [0, 1]: at IoU 0.50:0.95, 0.50 and 0.75, and for boxes of under 32, under 96
    and over 96 pixels squared; None where the data set has no box of that size.
    """

    ap: float
    ap50: float
    ap75: float
    small: float | None = None
    medium: float | None = None
    large: float | None = None


def refuse_other_tasks(task: str, what: str, file: str) -> None:
    """Raise for a task without boxes that can be measured here.

    Args:
        what: the option or tool that was asked for.
        file: an artefact, for the command that can measure it.

    Raises:
        ValueError: the task is none of TASKS.
    """
    if task not in TASKS:
        raise ValueError(
            f"{what} measures the AP of upright boxes, for models of the tasks {' and '.join(TASKS)}; this is one of the "
            f"task {task}. Ultralytics has the metrics of that: yolo {task} val model={file} data=..."
        )


def coco_ap(
    predict: Predict, data: DataSet, *, names: Mapping[int, str], size: int | tuple[int, int], title: str = ""
) -> AP:
    """Evaluate a detector.

    Args:
        predict: the detector without NMS, or with it in the graph.
        names: of the detector's classes, by index.
        size: height and width in pixels that pictures are letterboxed to.
        title: of the progress bar; none if empty.

    Raises:
        ValueError: the data set has none of the classes, or a picture cannot be read.
    """
    return evaluate(data, found_in(predict, data, names=names, size=size, title=title))


def found_in(
    predict: Predict, data: DataSet, *, names: Mapping[int, str], size: int | tuple[int, int], title: str = ""
) -> Found:
    """All that a detector finds in a data set, in pixels of each picture; what is kept of one picture are its rows alone."""
    category = data.categories(names)
    rows: list[Found] = [np.empty((0, 7))]
    for picture in tqdm(data.pictures, desc=title, disable=not title, unit="picture"):
        found = detections(predict, picture.path, size, nc=len(names))
        kept = [row for row in found if int(row[5]) in category]
        if kept:
            x1, y1, x2, y2, score, kind = np.array(kept).T
            of = np.array([category[int(k)] for k in kind])
            rows.append(np.stack([np.full_like(x1, picture.id), x1, y1, x2 - x1, y2 - y1, score, of], 1))
    return np.concatenate(rows)


def evaluate(data: DataSet, found: Found) -> AP:
    """COCO's numbers for what was found."""
    if not len(found):
        return AP(0.0, 0.0, 0.0, *(None if none else 0.0 for none in _empty_sizes(data)))
    with redirect_stdout(io.StringIO()):
        evaluation: Any = COCOeval(data.truth, data.truth.loadRes(found), "bbox")
        evaluation.params.imgIds = [picture.id for picture in data.pictures]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [float(value) for value in evaluation.stats[:6]]
    return AP(*values[:3], *(None if value < 0 else value for value in values[3:]))


def _empty_sizes(data: DataSet) -> list[bool]:
    areas = [annotation["area"] for annotation in data.truth.dataset["annotations"]]
    bounds = (0, 32**2, 96**2, float("inf"))
    return [not any(low <= area < high for area in areas) for low, high in zip(bounds, bounds[1:])]


def save(found: Found, path: Path) -> None:
    """Write detections as COCO's JSON of results, in which scores and pixels have four digits.

    Raises:
        TargetError: `path` cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for index, (picture, *box, score, kind) in enumerate(found.tolist()):
            about = {"image_id": int(picture), "category_id": int(kind), "bbox": [round(v, 4) for v in box]}
            stream.write(("[\n" if not index else ",\n") + json.dumps({**about, "score": round(score, 4)}))
        stream.write("\n]\n" if len(found) else "[]\n")


def detections(
    predict: Predict, picture: Path, size: int | tuple[int, int], confidence: float = 0.001, *, nc: int
) -> Iterator[list[float]]:
    """What a detector of `nc` classes finds in a picture: x1, y1, x2, y2 in its own pixels, score and class index."""
    boxed = (size, size) if isinstance(size, int) else size
    batch = pictures(boxed, paths=[picture])
    shape = np.asarray(cv2.imread(str(picture))).shape[:2]
    with torch.no_grad():
        output = predict(batch)
        if _final(output):
            found = output[0][output[0][:, 4] > confidence]
        else:
            found = non_max_suppression(output, conf_thres=confidence, iou_thres=0.7, max_det=300, nc=nc)[0]
    found[:, :4] = torch.as_tensor(scale_boxes(boxed, found[:, :4], shape))
    yield from found[:, :6].tolist()


def _final(output: Tensor) -> bool:
    """Whether these are rows of NMS or of an end-to-end head: the sixth column has classes then, which are whole numbers,
    and else all that is predicted for the sixth anchor.
    """
    return output.shape[2] >= 6 and bool((output[0, :, 5] == output[0, :, 5].round()).all())

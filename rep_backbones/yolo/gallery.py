"""A picture of pictures with the boxes that a detector finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils.plotting import Annotator, colors

from rep_backbones.export.files import replacing
from rep_backbones.yolo.coco_ap import Predict, detections

CONFIDENCE = 0.4  # of the boxes that are drawn


def gallery(
    predict: Predict,
    paths: Sequence[Path],
    target: Path,
    *,
    names: Mapping[int, str],
    size: int,
    columns: int = 4,
    tile: tuple[int, int] = (320, 320),
) -> int:
    """Draw what `predict` detects in the pictures at `paths` into the PNG or JPEG file `target`.

    Args:
        size: height and width in pixels that pictures are letterboxed to for the detector.
        tile: (width, height) of each picture in the result; larger ones are scaled, boxes with them.

    Returns:
        The number of boxes drawn.
    """
    tiles, drawn = [], 0
    for path in paths:
        picture = cv2.imread(str(path))
        if picture is None:
            raise ValueError(f"{path} is not a picture that OpenCV reads")
        scale = np.array([tile[0] / picture.shape[1], tile[1] / picture.shape[0]] * 2)
        annotator = Annotator(np.ascontiguousarray(cv2.resize(picture, tile)), line_width=2, font_size=10)
        for *box, score, kind in detections(predict, path, size, CONFIDENCE, nc=len(names)):
            annotator.box_label(np.array(box) * scale, f"{names[int(kind)]} {score:.2f}", color=colors(int(kind), True))
            drawn += 1
        tiles.append(annotator.result())
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[index : index + columns]) for index in range(0, len(tiles), columns)]
    with replacing(target) as temporary:
        cv2.imwrite(str(temporary), np.vstack(rows))
    return drawn

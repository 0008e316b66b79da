"""A made detection data set: circles, squares and triangles on textured backgrounds, in YOLO and in COCO form.

data.yaml  images/{train,val}/*.jpg  labels/{train,val}/*.txt  annotations/instances_{train,val}.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

NAMES = ("circle", "square", "triangle")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One drawn shape: its class, and its box (x, y, width, height) in pixels, x and y of the upper left corner."""

    kind: int
    box: Box


def make_shapes(folder: Path, *, train: int = 320, val: int = 80, size: int = 160, seed: int = 0) -> Path:
    """Write the data set; the same pictures for the same arguments.

    Args:
        folder: made if missing; files of an earlier set are replaced.
        train, val: number of pictures.
        size: height and width in pixels, at least 64.
        seed: of the random number generator.

    Returns:
        The path of `data.yaml`.

    Raises:
        ValueError: a number of pictures below 1, or pictures too small to show anything.
    """
    if min(train, val) < 1 or size < 64:
        raise ValueError(f"train={train}, val={val}, size={size}: at least one picture each, and 64 pixels, are needed")
    rng = np.random.default_rng(seed)
    for part, number in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        pictures = [draw(rng, size) for _ in range(number)]
        for index, (picture, things) in enumerate(pictures):
            cv2.imwrite(str(folder / "images" / part / f"{index:04d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
            (folder / "labels" / part / f"{index:04d}.txt").write_text("".join(_yolo(thing, size) for thing in things))
        (folder / "annotations").mkdir(exist_ok=True)
        coco = json.dumps(_coco([things for _, things in pictures], size))
        (folder / "annotations" / f"instances_{part}.json").write_text(coco)
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    (folder / "data.yaml").write_text(
        f"path: {json.dumps(str(folder.resolve()))}\ntrain: images/train\nval: images/val\nnames:\n{names}"
    )
    return folder / "data.yaml"


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[Thing]]:
    """One picture `(size, size, 3)` uint8 with one to four shapes that hardly overlap."""
    picture = _texture(rng, size)
    things: list[Thing] = []
    for _ in range(int(rng.integers(1, 5))):
        for _ in range(20):  # places that are tried
            side = int(rng.integers(size // 7, size // 3))
            x, y = (int(v) for v in rng.integers(1, size - side - 1, 2))
            box = (float(x), float(y), float(side), float(side))
            if all(_overlap(box, other.box) < 0.05 for other in things):
                kind = int(rng.integers(len(NAMES)))
                _shape(picture, kind, box, _colour(rng, picture, box))
                things.append(Thing(kind, box))
                break
    noise = rng.normal(0, 6, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), things


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clouds of two scales and stripes, in a random tint."""
    picture = np.zeros((size, size, 3), np.float32)
    for cells, strength in ((4, 70), (size // 4, 30)):
        clouds = rng.random((cells, cells, 3)).astype(np.float32)
        picture += strength * cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
    y, x = np.mgrid[:size, :size]
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    picture += rng.uniform(4, 14) * stripes[..., None] + rng.uniform(20, 110, 3)
    return np.clip(picture, 0, 255).astype(np.float32)


def _colour(rng: np.random.Generator, picture: np.ndarray, box: Box) -> tuple[float, ...]:
    """A colour that stands out from the background under the box by at least 70 in one channel."""
    x, y, w, h = (int(v) for v in box)
    behind = picture[y : y + h, x : x + w].mean((0, 1))
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - behind).max() >= 70:
            return tuple(float(v) for v in colour)


def _shape(picture: np.ndarray, kind: int, box: Box, colour: tuple[float, ...]) -> None:
    x, y, side = int(box[0]), int(box[1]), int(box[2])
    if kind == 0:
        radius = side / 2
        centre = (round((x + radius) * 16), round((y + radius) * 16))  # 4 fractional bits
        cv2.circle(picture, centre, round(radius * 16), colour, -1, cv2.LINE_AA, 4)
    elif kind == 1:
        cv2.rectangle(picture, (x, y), (x + side - 1, y + side - 1), colour, -1)
    else:
        corners = np.array([[x, y + side], [x + side, y + side], [x + side // 2, y]], np.int32)
        cv2.fillPoly(picture, [corners], colour, cv2.LINE_AA)


def _overlap(a: Box, b: Box) -> float:
    """Intersection as a fraction of the smaller box."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _yolo(thing: Thing, size: int) -> str:
    x, y, w, h = thing.box
    return " ".join([str(thing.kind), *(f"{v / size:.6f}" for v in (x + w / 2, y + h / 2, w, h))]) + "\n"


def _coco(pictures: list[list[Thing]], size: int) -> dict[str, Any]:
    images = [
        {"id": index, "file_name": f"{index:04d}.jpg", "width": size, "height": size} for index in range(len(pictures))
    ]
    found = [(index, thing) for index, things in enumerate(pictures) for thing in things]
    annotations = [
        {
            "id": number,
            "image_id": index,
            "category_id": thing.kind + 1,
            "bbox": list(thing.box),
            "area": thing.box[2] * thing.box[3],
            "iscrowd": 0,
        }
        for number, (index, thing) in enumerate(found, 1)
    ]
    categories = [{"id": index, "name": name} for index, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}

"""Pictures with their true boxes, in COCO's form: from a YOLO data YAML, or a folder in the layout of COCO.

Nothing is downloaded, and a YAML's `download:` is never run. Nothing is written beside the pictures.

    coco/annotations/instances_val2017.json    the boxes
    coco/images/val2017/000000000139.jpg       or coco/val2017/000000000139.jpg
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from ultralytics.data.utils import IMG_FORMATS, img2label_paths, verify_image_label
from ultralytics.utils import SETTINGS, YAML

WHERE = "give a YOLO data YAML, or a folder with annotations/instances_val*.json"
SPLITS = ("val", "test", "train")


@dataclass(frozen=True)
class Picture:
    """A picture by its id in the data set."""

    id: int
    path: Path


@dataclass(frozen=True, eq=False)
class DataSet:
    """The pictures of one split, and what is in them.

    Attributes:
        truth: boxes and categories, as pycocotools has them.
        names: class index of a YOLO data set -> name; empty for COCO, whose categories are found by name.
        calibration: paths of the training pictures, or of these where the data set has no others.
    """

    name: str
    pictures: list[Picture]
    truth: COCO
    names: dict[int, str] = field(default_factory=dict)
    calibration: list[Path] = field(default_factory=list)

    def some(self, count: int) -> DataSet:
        """At most `count` of its pictures, evenly spread."""
        step = max(-(-len(self.pictures) // count), 1)
        return replace(self, pictures=self.pictures[::step])

    def categories(self, names: Mapping[int, str]) -> dict[int, int]:
        """The category id of each class of a detector, found by name, such as COCO's 1 to 90 for its 80 classes.

        Raises:
            ValueError: the data set has none of the classes.
        """
        known = {category["name"]: category["id"] for category in self.truth.dataset["categories"]}
        found = {index: known[name] for index, name in names.items() if name in known}
        if not found:
            there, asked = ", ".join(list(known)[:20]), ", ".join(list(names.values())[:20])
            raise ValueError(
                f"{self.name} has the classes {there}; the detector has {asked}. Give the data it was trained for"
            )
        return found


def open_data(path: Path, split: str = "val") -> DataSet:
    """The data set at `path`: a YOLO data YAML, a folder in COCO's layout, or a folder with one YAML.

    Raises:
        ValueError: it is neither, has no such split, or a picture or label cannot be read; with what is accepted.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; accepted are {', '.join(SPLITS)}")
    if not path.exists():
        raise ValueError(f"the data {path} does not exist, and nothing is downloaded; {WHERE}")
    if path.is_dir():
        return _coco(path, split)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"the data {path} is no YAML; {WHERE}")
    return _yolo(path, split)


# ---- COCO --------------------------------------------------------------------------------------------------------------


def _coco(folder: Path, split: str) -> DataSet:
    files = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
    if not files:
        yamls = sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
        if len(yamls) == 1:
            return _yolo(yamls[0], split)
        raise ValueError(f"{folder} holds no annotations/instances_{split}*.json and not one YAML; {WHERE}")
    truth = coco_truth(files[-1])
    part = files[-1].stem.removeprefix("instances_")
    images = _image_folder(folder, part)
    pictures = [Picture(entry["id"], images / entry["file_name"]) for entry in truth.dataset["images"]]
    training = sorted((folder / "annotations").glob("instances_train*.json"))
    try:
        calibration = _images(_image_folder(folder, training[-1].stem.removeprefix("instances_"))) if training else []
    except ValueError:  # COCO's training pictures are often left out where only evaluation is done
        calibration = []
    return _checked(DataSet(folder.name, pictures, truth, {}, calibration or [p.path for p in pictures]))


def coco_truth(file: Path) -> COCO:
    """The annotations in a JSON file of COCO's.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with redirect_stdout(io.StringIO()):
            truth = COCO(str(file))
        missing = [key for key in ("images", "annotations", "categories") if key not in truth.dataset]
    except (OSError, AssertionError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a JSON file of COCO's ({type(error).__name__}: {error})") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}, which a file of COCO's instances has")
    return truth


def _image_folder(folder: Path, part: str) -> Path:
    tried = [folder / "images" / part, folder / part, folder / "images"]
    for place in tried:
        if place.is_dir():
            return place
    raise ValueError(f"the pictures of {part} are in none of {', '.join(map(str, tried))}")


# ---- YOLO --------------------------------------------------------------------------------------------------------------


def _yolo(file: Path, split: str) -> DataSet:
    content = _mapping(file)
    names = content.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not all(isinstance(key, int) for key in names):
        raise ValueError(f"{file}: `names:` must list the classes, or map numbers to names, got {names!r}")
    root = _root(file, content)
    paths = _split(file, content, root, split)
    pictures = [Picture(index, path) for index, path in enumerate(paths, 1)]
    names = {index: str(name) for index, name in names.items()}
    calibration = _split(file, content, root, "train") if content.get("train") else paths
    return _checked(DataSet(file.stem, pictures, _truth(pictures, names), names, calibration))


def _mapping(file: Path) -> dict[str, Any]:
    try:
        content = YAML.load(file)
    except Exception as error:  # the parser's own errors, and what it reads with
        raise ValueError(f"{file} is no YAML that can be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no data YAML: it holds {type(content).__name__}; it must map val, names ... to values")
    return content


def _root(file: Path, content: dict[str, Any]) -> Path:
    """`path:` as Ultralytics reads it: absolute, from here, or below its folder of data sets; else the YAML's folder."""
    given = content.get("path")
    if not given:
        return file.parent
    places = [Path(str(given)), file.parent / str(given), Path(SETTINGS["datasets_dir"]) / str(given)]
    return next((place for place in places if place.is_dir()), places[0])


def _split(file: Path, content: dict[str, Any], root: Path, split: str) -> list[Path]:
    given = content.get(split)
    if not given:
        there = ", ".join(key for key in SPLITS if content.get(key)) or "none"
        raise ValueError(f"{file} has no `{split}:`; its splits are {there}")
    paths: list[Path] = []
    for entry in given if isinstance(given, list) else [given]:
        place = root / str(entry)
        if place.is_dir():
            paths += _images(place)
        elif place.is_file():
            lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
            paths += [place.parent / line if line.startswith("./") else root / line for line in lines if line]
        else:
            hint = "; nothing is downloaded here: fetch it first" if "download" in content else ""
            raise ValueError(f"{file}: `{split}: {entry}` is neither a folder nor a list of pictures at {place}{hint}")
    if not paths:
        raise ValueError(f"{file}: `{split}: {given}` holds no picture")
    return paths


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMG_FORMATS)


def _truth(pictures: Sequence[Picture], names: Mapping[int, str]) -> COCO:
    """The labels beside pictures as COCO has them, boxes in pixels."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    labels = img2label_paths([str(picture.path) for picture in pictures])
    for picture, label in zip(pictures, labels):
        read = verify_image_label((str(picture.path), label, "", False, len(names), 0, 0, False))
        if read[0] is None:
            raise ValueError(f"{picture.path} or its label {label} cannot be read: {str(read[-1]).strip()}")
        height, width = read[2]
        images.append({"id": picture.id, "file_name": str(picture.path), "width": width, "height": height})
        boxes += _boxes(np.asarray(read[1], dtype=np.float64), picture.id, width, height, len(boxes))
    truth = COCO()
    categories = [{"id": index + 1, "name": name} for index, name in names.items()]
    truth.dataset = {"info": {}, "images": images, "annotations": boxes, "categories": categories}
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _boxes(rows: Any, picture: int, width: int, height: int, before: int) -> Iterator[dict[str, Any]]:
    for offset, (kind, x, y, w, h) in enumerate(rows[:, :5], 1):
        size = (float(w * width), float(h * height))
        box = [float(x * width - size[0] / 2), float(y * height - size[1] / 2), *size]
        about = {"id": before + offset, "image_id": picture, "category_id": int(kind) + 1, "iscrowd": 0}
        yield {**about, "bbox": box, "area": size[0] * size[1]}


def _checked(data: DataSet) -> DataSet:
    missing = [picture.path for picture in data.pictures if not picture.path.is_file()]
    if missing:
        raise ValueError(f"{data.name}: {len(missing)} of {len(data.pictures)} pictures are missing, such as {missing[0]}")
    if not data.truth.dataset["annotations"]:
        raise ValueError(f"{data.name}: not one of its {len(data.pictures)} pictures has a labelled box")
    return data

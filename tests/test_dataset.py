"""Data sets in YOLO's and COCO's form, read alike and without side effects; AP by size; the layout of COCO 2017."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics.utils import ROOT, YAML

import rep_backbones.yolo.dataset as dataset
from rep_backbones.yolo import shapes
from rep_backbones.yolo.coco_ap import coco_ap, evaluate, found_in, save
from rep_backbones.yolo.dataset import open_data

# the 91 ids of COCO's categories that its 80 classes do not use
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.make_shapes(tmp_path_factory.mktemp("drawn"), train=3, val=5, size=96).parent


def boxes(data: dataset.DataSet) -> list[list[float]]:
    """Boxes by picture and place, with the name of their class."""
    categories = {c["id"]: c["name"] for c in data.truth.dataset["categories"]}
    order = {picture.id: picture.path.name for picture in data.pictures}
    rows = [[order[a["image_id"]], categories[a["category_id"]], *a["bbox"]] for a in data.truth.dataset["annotations"]]
    return sorted(rows, key=str)


def test_both_forms_give_the_same(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    yolo, coco = open_data(drawn / "data.yaml"), open_data(drawn)
    assert len(yolo.pictures) == len(coco.pictures) == 5
    for a, b in zip(boxes(yolo), boxes(coco), strict=True):
        assert a[:2] == b[:2] and a[2:] == pytest.approx(b[2:], abs=0.01)
    assert [len(data.calibration) for data in (yolo, coco)] == [3, 3]
    assert yolo.names == dict(enumerate(shapes.NAMES)) and len(open_data(drawn, "train").pictures) == 3
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before, "no cache is left beside the pictures"


def test_lists_of_pictures_and_paths_relative_to_the_yaml(drawn: Path, tmp_path: Path) -> None:
    pictures = sorted((drawn / "images" / "val").glob("*.jpg"))[:2]
    (drawn / "some.txt").write_text(f"./images/val/{pictures[0].name}\n{pictures[1]}\n")
    (drawn / "list.yaml").write_text("val: [some.txt, images/train]\nnames: [circle, square, triangle]\n")
    data = open_data(drawn / "list.yaml")
    assert [picture.path.name for picture in data.pictures[:2]] == [p.name for p in pictures] and len(data.pictures) == 5
    assert len(data.calibration) == 5, "without a train split, the pictures themselves"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("val: images/val", "`names:` must list the classes"),
        ("names: [a]\ntrain: images/train", "has no `val:`; its splits are train"),
        ("names: [a]\nval: nowhere", "`val: nowhere` is neither a folder nor a list"),
        ("names: [a]\nval: nowhere\ndownload: print(1)", "nothing is downloaded here: fetch it first"),
        ("names: [a]\nval: labels", "holds no picture"),
        ("names: [a]\nval: images/val", "Label class 1 exceeds|cannot be read"),
        ("- 1", "it holds list|not a valid YAML mapping"),
        ("a: [", "no YAML that can be read"),
    ],
)
def test_what_is_no_data_set_is_told(drawn: Path, content: str, said: str) -> None:
    (drawn / "bad.yaml").write_text(content)
    try:
        with pytest.raises(ValueError, match=said):
            open_data(drawn / "bad.yaml")
    finally:
        (drawn / "bad.yaml").unlink()


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist, and nothing is downloaded; give a YOLO data YAML"):
        open_data(tmp_path / "coco.yaml")
    with pytest.raises(ValueError, match="holds no annotations/instances_val"):
        open_data(tmp_path)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ValueError, match="is no YAML"):
        open_data(tmp_path / "data.json")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="lacks annotations, categories"):
        open_data(tmp_path)
    (tmp_path / "annotations" / "instances_val.json").write_text("[1")
    with pytest.raises(ValueError, match="not a JSON file of COCO's"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="split='all' is not known"):
        open_data(tmp_path, "all")


def coco2017(folder: Path) -> tuple[Path, dict[int, str]]:
    """Four pictures in the exact layout of COCO 2017: 80 categories with their 91 ids, areas that are not width * height,
    a crowd, and boxes of three sizes."""
    names = list(YAML.load(ROOT / "cfg" / "datasets" / "coco.yaml")["names"].values())
    ids = [i for i in range(1, 91) if i not in UNUSED]
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images, annotations = [], []
    for index, side in enumerate((20, 60, 150, 150)):
        image = {"id": 139 + 7 * index, "file_name": f"{139 + 7 * index:012d}.jpg", "width": 200, "height": 180}
        cv2.imwrite(str(folder / "val2017" / image["file_name"]), np.full((180, 200, 3), 30 * index, np.uint8))
        images.append(image)
        about = {"id": 1000 + index, "image_id": image["id"], "category_id": ids[[0, 11, 79, 79][index]]}
        annotations.append({**about, "bbox": [10, 12, side, side], "area": 0.8 * side * side, "iscrowd": int(index == 3)})
    categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in zip(ids, names, strict=True)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder, dict(enumerate(names))


def test_the_layout_of_coco_2017(tmp_path: Path) -> None:
    folder, names = coco2017(tmp_path / "coco")
    data = open_data(folder)
    category = data.categories(names)
    assert len(category) == 80 and category[0] == 1 and category[11] == 13 and category[79] == 90
    answers = iter([(0, 20), (11, 60), (79, 150), (79, 150)])

    def knows(x: torch.Tensor) -> torch.Tensor:
        kind, side = next(answers)
        out = torch.zeros(1, 84, 1)
        scale, top = 96 / 200, (96 - 180 * 96 / 200) / 2  # letterboxed to 96 x 96
        out[0, :4, 0] = torch.tensor([(10 + side / 2) * scale, (12 + side / 2) * scale + top, side * scale, side * scale])
        out[0, 4 + kind, 0] = 0.9
        return out

    found = found_in(knows, data, names=names, size=96)
    assert found[:, 0].tolist() == [139, 146, 153, 160] and found[:, 6].tolist() == [1, 13, 90, 90]
    result = evaluate(data, found)
    assert (result.ap50, result.ap75) == pytest.approx((1, 1)) and result.ap > 0.7
    assert (result.small, result.medium, result.large) == pytest.approx((0.8, 0.9, 0.9), abs=0.2)
    save(found, tmp_path / "found.json")
    again = data.truth.loadRes(str(tmp_path / "found.json"))
    assert len(again.dataset["annotations"]) == 4
    assert json.loads((tmp_path / "found.json").read_text())[2]["bbox"] == pytest.approx([10, 12, 150, 150], abs=1.5)


def test_sizes_that_are_not_there_have_no_ap(drawn: Path) -> None:
    data = open_data(drawn)
    nothing = coco_ap(lambda x: torch.zeros(1, 7, 1), data, names=dict(enumerate(shapes.NAMES)), size=96)
    assert nothing.ap == 0 and nothing.large is None, "no drawn shape is larger than 96 x 96"


def test_final_rows_are_taken_as_they_are(drawn: Path) -> None:
    """What NMS in the graph, or an end-to-end head, gives: x1, y1, x2, y2, score, class."""
    data = open_data(drawn)
    rows = torch.zeros(1, 300, 6)
    rows[0, 0] = torch.tensor([8.0, 8.0, 40.0, 48.0, 0.9, 1.0])
    found = found_in(lambda x: rows.clone(), data, names=dict(enumerate(shapes.NAMES)), size=96)
    assert len(found) == len(data.pictures) and found[0, 1:6].tolist() == pytest.approx([8, 8, 32, 40, 0.9])

"""AP of any number of artefacts side by side, on the same pictures, prepared in the same way.

python tools/eval_coco.py best.pt best_deploy.pt best_deploy.onnx --data coco.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rep_backbones.export.files import replacing, writable_folder
from rep_backbones.yolo import backends, checkpoint, user_code
from rep_backbones.yolo.coco_ap import AP, evaluate, found_in, refuse_other_tasks, save
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.dataset import SPLITS, DataSet, open_data
from rep_backbones.yolo.switches import no_downloads, no_installs, quiet

COLUMNS = ("AP", "AP50", "AP75", "small", "medium", "large")


@dataclass(frozen=True)
class Form:
    """An artefact that can be run: what it is called, the names of its classes, and the size it was trained for."""

    path: Path
    run: Callable[[Tensor], Tensor]
    names: Mapping[int, str]
    size: tuple[int, int] | None


def opened(path: Path, *, trust: bool = False, device: str = "cpu") -> Form:
    """The artefact at `path`.

    Raises:
        Refused, ValueError: as `checkpoint.load_precise` and `backends.runner`; for a file that does not name its classes,
            or is of a task without upright boxes.
        MissingBackend: what runs it is not installed.
    """
    if path.suffix == ".pt":
        loaded = checkpoint.load_precise(path, trust=trust)
        refuse_other_tasks(loaded.task, f"eval_coco of {path.name}", str(path))
        return Form(path, backends.model_predictor(loaded.model, device), loaded.names, _size(loaded.args.get("imgsz")))
    run = backends.runner(path, device=device)
    names = run.about.get("names")
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"{path} does not name its classes; give a file that tools/fuse_export.py or Ultralytics exported")
    refuse_other_tasks(str(run.about.get("task", "detect")), f"eval_coco of {path.name}", str(path))
    return Form(
        path, lambda x: run(x)[0], {int(key): str(name) for key, name in names.items()}, _size(run.about.get("imgsz"))
    )


def _size(given: Any) -> tuple[int, int] | None:
    sides = list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(side, int) for side in sides) or len(sides) not in (1, 2):
        return None
    return sides[0], sides[-1]


def table(rows: Mapping[str, AP]) -> str:
    """A Markdown table in points of 100, with the difference of each AP to the first row's."""
    lines = ["| form | " + " | ".join(COLUMNS) + " | difference |", "|---" * (len(COLUMNS) + 2) + "|"]
    first = next(iter(rows.values()))
    for name, found in rows.items():
        numbers = " | ".join("" if value is None else f"{100 * value:.2f}" for value in astuple(found))
        difference = "" if found is first else f"{100 * (found.ap - first.ap):+.2f}"
        lines.append(f"| {name} | {numbers} | {difference} |")
    return "\n".join(lines) + "\n"


def evaluated(forms: Sequence[Form], data: DataSet, size: tuple[int, int], out: Path | None = None) -> dict[str, AP]:
    """AP of each artefact by its file's name; with `out`, what it found goes there as COCO's JSON."""
    rows = {}
    for form in forms:
        found = found_in(form.run, data, names=form.names, size=size, title=form.path.name)
        if out is not None:
            save(found, out / f"{form.path.name}.detections.json")
        rows[form.path.name] = evaluate(data, found)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 bad input, 3 an artefact failed, 4 a backend is missing, 130."""
    options = _parser().parse_args(argv)
    with no_installs(), no_downloads(), quiet():
        return ended("eval_coco", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    for note in user_code.load(options.imports):
        print(f"eval_coco: note: {note}")
    out = writable_folder(options.out) if options.out else None
    data = open_data(options.data, options.split)
    data = data.some(options.limit) if options.limit else data
    forms = [opened(path, trust=options.trust, device=options.device) for path in options.artefacts]
    size = _size(options.imgsz) or next((form.size for form in forms if form.size), (640, 640))
    for form in forms:
        data.categories(form.names)
    rows = evaluated(forms, data, size, out)
    text = f"{len(data.pictures)} pictures of {data.name}, {size[0]} x {size[1]} pixels\n\n{table(rows)}"
    if out is not None:
        with replacing(out / "ap.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eval_coco.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artefacts", nargs="+", type=Path, help=".pt, .onnx, .torchscript, .engine, or exported folders")
    parser.add_argument("--data", type=Path, required=True, help="a data YAML, or a folder in COCO's layout")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of the data (default: val)")
    parser.add_argument(
        "--imgsz", nargs="+", type=int, help="pixels, or height and width (default: what the first was made for)"
    )
    parser.add_argument("--limit", type=int, help="evaluate on at most so many pictures, evenly spread (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the table and the detections of each (default: none)"
    )
    parser.add_argument("--device", default="cpu", help="of .pt and .engine (default: cpu)")
    parser.add_argument("--trust", action="store_true", help="unpickle .pt files with all code that they hold")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FILE", help="your own layers; may be repeated"
    )
    return parser

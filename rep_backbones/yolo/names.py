"""Model YAMLs by name: where a file is found, and which scale its name asks for.

`efficientrep-s.yaml` is a file of that name, else `efficientrep.yaml` with its scale `s`; `repvgg-a0-cls.yaml` likewise is
`repvgg-cls.yaml` with its scale `a0`. What the user has beside the name given comes before what this package carries.
Ultralytics finds a scale only in names of the form yolo + digits + letter.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.utils import YAML

SUFFIXES = (".yaml", ".yml")
TASKS = ("-cls", "-seg", "-pose", "-obb")  # endings of names, by which Ultralytics tells the task
_PACKAGE = Path(__file__).resolve().parent.parent


class Found(NamedTuple):
    """A model YAML: the file, and the scale that its name asks for ("" where it asks for none)."""

    file: Path
    scale: str


def cfg_folder() -> Path | None:
    """The folder of this package's own YAMLs: installed inside the package, else that of a checkout or an editable
    install.
    """
    folders = (_PACKAGE / "cfg", _PACKAGE.parent / "cfg")
    return next((folder for folder in folders if any("backbone" in _model(file) for file in _yaml_files(folder))), None)


def packaged() -> list[str]:
    """The names of the model YAMLs that this package carries, one for each scale."""
    names = set()
    for file in _yaml_files(cfg_folder()):
        model = _model(file)
        if "backbone" in model:
            scaled = {_scaled(file.stem, scale) for scale in _scales(model) if not file.stem.endswith(f"-{scale}")}
            names |= {f"{stem}{file.suffix}" for stem in scaled or {file.stem}}
    return sorted(names)


def find(path: str | Path) -> Found | None:
    """The model YAML that `path` names, or None where neither the user nor this package has it.

    Args:
        path: a file, or the name of one of this package's YAMLs; the stem may have "-" and a key of the file's `scales` at
            its end, or in front of another part.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        return None
    found = _in_folder(path.parent, path)
    if found is None and path.parent == Path(".") and (folder := cfg_folder()):
        found = _in_folder(folder, path)
    return found


def missing(path: str | Path) -> str:
    """What to say of a model YAML that was not found: its name, and the nearest names there are."""
    name, known = Path(path).name, packaged()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"model file {str(path)!r} does not exist. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"rep_backbones carries {', '.join(known) or 'no model here'}; any other name must be a file."
    )


def _in_folder(folder: Path, path: Path) -> Found | None:
    file = folder / path.name
    if file.is_file():
        return Found(file, _last_scale(file.stem, _model(file)))
    parts = path.stem.split("-")
    for place in range(len(parts) - 1, 0, -1):
        base = "-".join(parts[:place] + parts[place + 1 :])
        for suffix in (path.suffix, *SUFFIXES):
            file = folder / f"{base}{suffix}"
            if file.is_file() and parts[place] in _scales(_model(file)):
                return Found(file, parts[place])
    return None


def _scaled(stem: str, scale: str) -> str:
    """The name of a file's scale: at the end, but in front of a task."""
    task = next((ending for ending in TASKS if stem.endswith(ending)), "")
    return f"{stem.removesuffix(task)}-{scale}{task}"


def _last_scale(stem: str, model: dict[str, Any]) -> str:
    """The scale at the end of the name, else the one that the file asks for by its own key `scale`."""
    scales, last = _scales(model), stem.rpartition("-")[2]
    if last != stem and last in scales:
        return last
    own = model.get("scale")
    return own if isinstance(own, str) and own in scales else ""


def _scales(model: dict[str, Any]) -> list[str]:
    scales = model.get("scales")
    return [str(scale) for scale in scales] if isinstance(scales, dict) else []


def _model(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for anything else, which is the parser's to refuse."""
    try:
        content = YAML.load(file)
    except Exception:  # a broken file of the user's gets its message from the parser that was asked to read it
        return {}
    return content if isinstance(content, dict) else {}


def _yaml_files(folder: Path | None) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES) if folder and folder.is_dir() else []

"""Training recipes by name: `rep-yolo train cfg=repvgg.yaml` reads `cfg/recipes/repvgg.yaml` of this package.

A recipe is what Ultralytics calls a `cfg`, a YAML file of training arguments; what the command line gives comes before it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from rep_backbones.yolo.names import SUFFIXES, cfg_folder


def names() -> list[str]:
    """The names of the recipes that this package carries."""
    folder = _folder()
    return sorted(file.name for file in folder.glob("*.yaml")) if folder else []


def find(name: str | Path) -> Path:
    """The file of a recipe: one of the user's own, else that of this package; ".yaml" may be left out.

    Raises:
        FileNotFoundError: with the nearest names.
    """
    given, folder = Path(name), _folder()
    if given.is_file():
        return given
    if folder and given.parent == Path(".") and given.suffix in ("", *SUFFIXES):
        file = folder / f"{given.stem if given.suffix else given.name}.yaml"
        if file.is_file():
            return file
    near = difflib.get_close_matches(given.name, names(), n=3, cutoff=0.5)
    raise FileNotFoundError(
        f"recipe {str(name)!r} does not exist. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"rep_backbones carries {', '.join(names()) or 'none here'}; any other name must be a file."
    )


def with_file(args: Sequence[str]) -> list[str]:
    """The arguments of `rep-yolo` with the file that `cfg=` names, in front: up to 8.4.100 it undoes what stands before."""
    rest = [arg for arg in args if arg.partition("=")[0] != "cfg"]
    given = [arg.partition("=")[2] for arg in args if arg.partition("=")[0] == "cfg"]
    return [f"cfg={find(given[-1])}", *rest] if given and given[-1] else list(args)


def _folder() -> Path | None:
    folder = cfg_folder()
    return folder / "recipes" if folder and (folder / "recipes").is_dir() else None

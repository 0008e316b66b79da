"""Code of the user's own that may run: `--import my_layers.py` names the file (or the module) that registers layers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rep_backbones.registry import KNOWN
from rep_backbones.yolo.allowed import within
from rep_backbones.yolo.plain_data import Refused


def load(named: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Import the files and modules `named`, before any checkpoint is read; returns notes on those that registered no layer.

    A file is imported under its own name without `.py`, so that a class pickled as `my_layers.CrossBlock` is found in
    my_layers.py. A module of a package is given as `package.module`.

    Raises:
        Refused: a file that is missing or raises, or whose name belongs to another module, with what to do.
    """
    notes = []
    for given in [os.fspath(path) for path in named]:
        name = _from_file(Path(given)) if given.endswith(".py") else _by_name(given)
        if not any(within(layer.cls.__module__, (name,)) for layer in KNOWN.values()):
            notes.append(f"{given} registers no layer; rep_backbones.register_layer(cls) makes one known to YAMLs and files")
    return notes


def _from_file(path: Path) -> str:
    name = path.stem
    if not path.is_file():
        raise Refused(f"--import {path}: there is no such file (looked in {path.absolute().parent})", "give its path")
    if not name.isidentifier():
        raise Refused(f"--import {path}: {name!r} cannot be the name of a module", "rename the file, such as my_layers.py")
    here = path.resolve()
    other = _origin(name)
    if other is not None and other != here:
        raise Refused(
            f"--import {path}: the name {name!r} belongs to {'Python itself' if other == Path() else other}",
            "rename the file",
        )
    if name in sys.modules:
        return name
    if str(here.parent) not in sys.path:  # for what it imports itself, and for the workers of a training on several GPUs
        sys.path.append(str(here.parent))
    spec = importlib.util.spec_from_file_location(name, here)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(path, error) from error
    return name


def _by_name(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        accepted = "accepted are a file that ends in .py, and a module such as my_package.layers"
        raise Refused(f"--import {name} is neither a file nor a module; {accepted}", "give its path")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error
    return name


def _origin(name: str) -> Path | None:
    """The file of the module that `name` means so far, an empty path if it has none, None if there is no such module."""
    loaded: ModuleType | None = sys.modules.get(name)
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        origin = spec.origin if spec.has_location else None
    return Path(origin).resolve() if origin else Path()


def _failed(given: Path | str, error: BaseException) -> Refused:
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = (
        f" at {Path(where.filename).name}:{where.lineno}"
        if not isinstance(error, (ModuleNotFoundError, SyntaxError))
        else ""
    )
    return Refused(
        f"--import {given} fails ({type(error).__name__}: {' '.join(str(error).split())}){line}",
        "mend it, or install what it needs; nothing is installed for you",
    )

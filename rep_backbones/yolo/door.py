"""What Ultralytics reads within `shut` it reads without executing it: checkpoints, model YAMLs, data YAMLs and label caches.

| upstream                                                | within `shut`                                              |
|---------------------------------------------------------|------------------------------------------------------------|
| unpickles a .pt, and installs the modules that it names | the model is rebuilt (`checkpoint`), the rest is plain data |
| calls what a model YAML's rows and activation name      | the YAML is validated (`safe_yaml`)                        |
| runs a data YAML's `download:` if the pictures lack     | refused, but for those of Ultralytics' own that are named   |
| unpickles labels.cache, which lies beside the labels    | one with code is not read, and made anew                   |
| fetches the pictures that an .ndjson file lists         | it is refused                                              |
| downloads fonts, and a model to test mixed precision    | only what the command names is downloaded                  |
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.data import converter
from ultralytics.data import utils as data_utils
from ultralytics.nn import tasks
from ultralytics.utils import DATASETS_DIR, LOGGER, ROOT, SETTINGS, YAML, checks, downloads

from rep_backbones.yolo import checkpoint, safe_yaml
from rep_backbones.yolo.plain_data import Refused
from rep_backbones.yolo.switches import no_downloads, replaced, replaced_everywhere

RUN_IT = "get the data yourself and put it there; if you trust where the file comes from, --trust runs it"
NAME_IT = "name it with data= if it may be fetched"
# what an array, or a dictionary with arrays, is pickled with
_ARRAYS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@contextmanager
def shut(named: Sequence[str]) -> Iterator[None]:
    """Within the block nothing that Ultralytics reads is executed, and only files `named` on the command line are fetched.

    What is refused raises `Refused`, with the reason and what to do.
    """
    with ExitStack() as stack:
        freely = stack.enter_context(no_downloads(named))
        made: set[str] = set()
        load = _loading(torch.load, made)
        changes: list[tuple[Any, str, Any]] = [
            (data_utils, "check_det_dataset", _detection_data(data_utils.check_det_dataset, named, freely)),
            (data_utils, "check_cls_dataset", _classification_data(data_utils.check_cls_dataset, named)),
            (data_utils, "load_dataset_cache_file", label_cache),
            (converter, "convert_ndjson_to_yolo", _no_list_of_addresses),
        ]
        for module, name, value in changes:
            stack.enter_context(replaced_everywhere(getattr(module, name), name, value))
        stack.enter_context(replaced(torch, "save", _remembering(torch.save, made)))
        stack.enter_context(replaced(torch, "load", load))
        stack.enter_context(replaced(tasks, "torch_safe_load", _rebuilding(load)))
        stack.enter_context(replaced(tasks, "parse_model", _checking_yaml(tasks.parse_model)))
        yield


def local(weight: Any) -> Path:
    """The file of a checkpoint; one of Ultralytics' own, or a URL, is downloaded as upstream does it."""
    file = Path(str(weight).strip())
    if file.name in downloads.GITHUB_ASSETS_NAMES or "://" in str(weight):
        file = Path(downloads.attempt_download_asset(weight))
    return file if file.exists() else Path(SETTINGS["weights_dir"]) / file


# ------------------------------------------------------------------------------------------------------------ checkpoints
def _rebuilding(load: Callable[..., Any]) -> Callable[..., Any]:
    def torch_safe_load(weight: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str]:
        file = local(weight)
        if not file.exists():
            raise FileNotFoundError(
                f"checkpoint {str(weight)!r} does not exist; give the path of a .pt file, or a model YAML to start anew"
            )
        return load(file, weights_only=False), str(file)

    return torch_safe_load


def _loading(stock: Callable[..., Any], made: set[str]) -> Callable[..., Any]:
    """`torch.load`: files that this process saved as ever, others rebuilt."""

    @functools.wraps(stock)
    def load(f: Any, *args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
        if weights_only is not False and kwargs.get("pickle_module") is None:
            return stock(f, *args, weights_only=True, **kwargs)
        if isinstance(f, io.BytesIO) or (isinstance(f, (str, os.PathLike)) and Path(f).is_file()):
            if _digest(f) in made:
                return stock(f, *args, weights_only=False, **kwargs)
        if not isinstance(f, (str, os.PathLike)):
            reason = f"{getattr(f, 'name', 'a stream')} is of a model family that is unpickled by Ultralytics alone"
            raise Refused(reason, "if you trust where it comes from, give --trust")
        return checkpoint.as_ultralytics(f)

    return load


def _remembering(stock: Callable[..., Any], made: set[str]) -> Callable[..., Any]:
    """`torch.save`, which keeps the digest of what it has written: a training reads its own checkpoints back."""

    @functools.wraps(stock)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(obj, f, *args, **kwargs)
        if isinstance(f, (str, os.PathLike, io.BytesIO)):
            made.add(_digest(f))
        return result

    return save


def _digest(f: Any) -> str:
    if isinstance(f, io.BytesIO):
        return hashlib.sha256(f.getbuffer()).hexdigest()
    digest = hashlib.sha256()
    with open(f, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------ YAMLs
def _checking_yaml(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A YAML may name any function as a layer, and its activation is evaluated: both only as what they should be."""

    @functools.wraps(stock)
    def parse_model(d: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return stock(safe_yaml.validated(d), *args, **kwargs)

    return parse_model


# ------------------------------------------------------------------------------------------------------------------- data
def _detection_data(stock: Callable[..., Any], named: Sequence[str], freely: Callable[[], Any]) -> Callable[..., Any]:
    wanted = {Path(word.partition("=")[2]).stem for word in named}

    @functools.wraps(stock)
    def check_det_dataset(dataset: Any, autodownload: bool = True, *args: Any, **kwargs: Any) -> Any:
        if Path(str(dataset)).stem in wanted and _shipped(dataset):
            with freely():
                return stock(dataset, autodownload, *args, **kwargs)
        try:
            return stock(dataset, False, *args, **kwargs)
        except FileNotFoundError as error:
            if not _downloads(dataset):
                raise
            missing = str(error).partition("\n")[0]
            remedy = NAME_IT if _shipped(dataset) else RUN_IT
            raise Refused(f"{dataset}: {missing}, and its `download:` is not run", remedy) from error

    return check_det_dataset


def _shipped(dataset: Any) -> bool:
    """Whether the name is that of a YAML in the installed Ultralytics, and of no file of the same name here."""
    if "://" in str(dataset):
        return False
    names = [str(dataset), f"{dataset}.yaml", f"{dataset}.yml"]
    file = next((found for name in names if (found := checks.check_file(name, download=False, hard=False))), "")
    return bool(file) and Path(file).resolve().is_relative_to(Path(ROOT).resolve())


def _downloads(dataset: Any) -> bool:
    file = checks.check_file(str(dataset), download=False, hard=False)
    if not file or Path(file).suffix not in (".yaml", ".yml"):
        return False
    content = YAML.load(file)
    return isinstance(content, dict) and bool(content.get("download"))


def _classification_data(stock: Callable[..., Any], named: Sequence[str]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def check_cls_dataset(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        here = Path(str(dataset)).exists() or (Path(DATASETS_DIR) / str(dataset)).exists()
        if not here and str(dataset) not in {word.partition("=")[2] for word in named}:
            raise Refused(f"the data set {str(dataset)!r} is not here, and not downloaded", "give it with data=")
        return stock(dataset, *args, **kwargs)

    return check_cls_dataset


def _no_list_of_addresses(data: Any, *args: Any, **kwargs: Any) -> Any:
    raise Refused(f"{data} is a list of addresses, which are not fetched", RUN_IT)


class _Plain(pickle.Unpickler):
    """Unpickles arrays and builtin containers; every other name is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise Refused(f"it refers to {module}.{name}", "the labels are read anew")
        return super().find_class(module, name)


def label_cache(path: Path) -> Any:
    """The dictionary in a .cache file of Ultralytics, which lies in the folder of the data set and is a pickled array.

    Raises FileNotFoundError for one that is damaged or holds anything but numbers, text and arrays, upon which Ultralytics
    reads the labels anew.
    """
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
            return _Plain(file).load().item()
        except Refused as error:
            LOGGER.warning(f"{path} is not used: {error}")
            raise FileNotFoundError(str(error)) from error
        except Exception as error:  # a damaged pickle may raise anything
            raise FileNotFoundError(f"{path} is damaged ({type(error).__name__}: {error})") from error

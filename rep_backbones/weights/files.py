"""A file, or what it holds, as a flat dictionary of names to tensors. Nothing in it is executed."""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.weights import archive
from rep_backbones.weights.errors import WeightsError

SUFFIXES = (".pt", ".pth", ".tar", ".bin", ".safetensors")
# where training code puts the weights, the averaged ones first
WRAPPERS = ("ema", "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
MAX_DEPTH = 4
STATE_DICT = (
    "where you trust the file, in the code that it comes from, make one of its weights alone: "
    "torch.save(model.float().state_dict(), 'weights.pth')"
)

Source = str | os.PathLike[str] | Mapping[str, Any]


def tensors_of(source: Source) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file or state dict by name, on the CPU where they were read, and what to call it in messages.

    Raises:
        WeightsError: for a file that is not there, damaged, no file of weights, or that would run code.
        TypeError: for anything but a path or a mapping.
    """
    if isinstance(source, Mapping):
        return _unwrapped(source, "the state dict"), "the state dict"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"weights are the path of a file or a state dict, got {type(source).__name__}")
    file = Path(source)
    return _unwrapped(_read(file), str(file)), str(file)


def _read(file: Path) -> Any:
    if "://" in str(file) or re.match(r"\w{2,}:/", str(file)):
        raise WeightsError(f"{file} is an address, and nothing is downloaded; download the file and give its path")
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked in {file.absolute().parent})"
        raise WeightsError(f"{file} {what}; give a file of weights that ends in {', '.join(SUFFIXES)}")
    if file.suffix.lower() not in SUFFIXES:
        raise WeightsError(f"{file} ends in {file.suffix or 'nothing'}; accepted are {', '.join(SUFFIXES)}")
    if file.suffix.lower() == ".safetensors":
        return _read_safetensors(file)
    try:
        _check_size(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except archive.Unsound as error:
        raise WeightsError(f"{file} is not loaded: {error}") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(_why_refused(file, str(error))) from None
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}); check its permissions, and the disk") from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise WeightsError(_damaged(file, error)) from None


def _check_size(file: Path) -> None:
    """PyTorch unpacks what is compressed: two megabytes may claim all memory before a shape is looked at."""
    with file.open("rb") as stream:
        start = stream.read(len(archive.START))
    if start == archive.START:
        archive.opened(file)[0].close()


def _why_refused(file: Path, message: str) -> str:
    names = re.findall(r"GLOBAL ([\w.]+)", message) or re.findall(r"[Cc]lass(?:es)? ([\w.]+\.[\w.]+)", message)
    if names:
        return (
            f"{file} is not loaded, and nothing in it was executed: it asks for {names[0]}, where weights are tensors under "
            f"names; {STATE_DICT}"
        )
    return _damaged(file, message)


def _damaged(file: Path, error: object) -> str:
    text = str(error).partition("WeightsUnpickler error: ")  # in front of it stands the advice to load it the old way
    first = (text[2] or text[0]).strip().partition("\n")[0][:200]
    return f"{file} is truncated or damaged, or no file of torch.save ({first}); copy or download it again"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        library = importlib.import_module("safetensors.torch")
    except ImportError:
        raise WeightsError(f"{file} needs a package that is not installed: pip install safetensors") from None
    try:
        found: dict[str, Tensor] = library.load_file(str(file))
        return found
    except Exception as error:  # its own error class, OSError, ValueError
        raise WeightsError(f"{file} is truncated or damaged ({error}); copy or download it again") from None


def _unwrapped(value: Any, name: str) -> dict[str, Tensor]:
    for _ in range(MAX_DEPTH):
        if isinstance(value, nn.Module):
            raise WeightsError(f"{name} holds a whole model, {type(value).__name__}, not weights; {STATE_DICT}")
        if not isinstance(value, Mapping):
            raise WeightsError(f"{name} holds a {type(value).__name__}, where weights are tensors under names")
        wrapper = next((key for key in WRAPPERS if value.get(key) is not None and not _is_tensor(value[key])), None)
        if wrapper is None:
            break
        value = value[wrapper]
    tensors = {str(key): item for key, item in value.items() if _is_tensor(item)}
    if others := [str(key) for key in value if str(key) not in tensors]:
        if not tensors:
            raise WeightsError(f"{name} holds no tensors, but {', '.join(others[:5])}; {STATE_DICT}")
        raise WeightsError(f"{name}: {others[0]} is a {type(value[others[0]]).__name__} among tensors; leave it out")
    if not tensors:
        raise WeightsError(f"{name} holds nothing")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)

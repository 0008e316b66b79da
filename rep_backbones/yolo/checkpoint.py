"""Loads Ultralytics checkpoints without executing them.

    checkpoint = load("best.pt")          # a rebuilt model with the file's weights, or Refused with the reason
    checkpoint = load_precise("best.pt")  # the same, with the FP32 weights of best_fp32.pt where those belong to it

A .pt file is a pickle, and unpickling runs what the file says. Here the file is only read (`unpickle`), its names are held
against a list (`allowed`), its YAML is checked (`safe_yaml`), and the model is built anew from both (`rebuild`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT

from rep_backbones.weights.archive import DAMAGED
from rep_backbones.yolo.plain_data import Refused, Stored, StoredTensor, plain
from rep_backbones.yolo.rebuild import MODELS, model_name, rebuild, stored_yaml
from rep_backbones.yolo.unpickle import Archive

__all__ = ["Checkpoint", "Refused", "as_ultralytics", "check", "load", "load_precise"]

_unpickle = torch.load  # what `trust` asks for, also while `door.shut` keeps Ultralytics from it

SUFFIXES = (".pt", ".pth")
GIVE = "give a checkpoint that Ultralytics saved, such as runs/detect/train/weights/best.pt"
EXPORTS = (".engine", ".mlpackage", ".onnx", ".pb", ".tflite", ".torchscript", ".xml")
BEGINNINGS = {  # what a file that is no archive starts with -> what it is, and what to do
    b"\x80": ("a bare pickle, or saved before PyTorch 1.6", "load it where you trust it, and save it with torch.save"),
    b"\x08": ("an ONNX model by its looks", GIVE),
    b"version https://git-lfs": ("the pointer of Git LFS, not the file itself", "run `git lfs pull`"),
    b"<": ("a web page, not a checkpoint: its download has failed", "download it again"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A loaded checkpoint: the model (float32, on the CPU, in eval mode) and what the file says about it."""

    path: Path
    model: nn.Module
    task: str  # detect, segment, pose, obb or classify
    yaml: dict[str, Any]
    names: dict[int, str]
    stride: torch.Tensor  # (levels of the head,)
    args: dict[str, Any]  # the training arguments
    epoch: int | None  # -1 once training has ended
    date: str | None
    version: str | None  # of Ultralytics, when it was saved
    dtype: torch.dtype  # in which the file stores the weights
    digest: str  # sha256 of the file, hexadecimal
    precise: bool = False  # the weights are those of the FP32 file beside it
    note: str = ""  # why they are not, where there is such a file


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Checkpoint:
    """The checkpoint at `path`: its EMA if it has one, else its model, as Ultralytics chooses.

    Nothing in the file is executed, unless `trust` is given: then it is unpickled as torch.load does it, with all the code
    that it holds (but nothing is installed or downloaded for it). Raises Refused for every file that is not loaded.
    """
    file = existing(path)
    with _refusing(file, "" if trust else ", and nothing in it was executed"):
        return _trusted(file) if trust else _rebuilt(file)


def check(path: str | os.PathLike[str]) -> None:
    """Raises Refused if `load` would refuse `path` for what the file says, without building the model."""
    file = existing(path)
    with _refusing(file, ", and nothing in it was executed"), Archive(file) as archive:
        contents = _contents(archive)
        root = _root(contents)
        model_name(root)
        _names(plain(root.attributes().get("names", {}), "names"), stored_yaml(root))
        _training_args(contents)


def load_precise(path: str | os.PathLike[str], *, trust: bool = False) -> Checkpoint:
    """`load`, then the FP32 weights of `<stem>_fp32.pt` (a file of our trainer) in place of the rounded ones.

    They are taken if rounding them gives the checkpoint's weights bit for bit, so a file of another run changes nothing;
    `precise` says whether, `note` why not. Raises Refused as `load` does, for the checkpoint itself only.
    """
    checkpoint = load(path, trust=trust)
    beside = checkpoint.path.with_name(f"{checkpoint.path.stem}_fp32.pt")
    if not beside.exists():
        return checkpoint
    try:
        state = _precise_state(existing(beside), checkpoint)
    except Refused as error:
        return replace(checkpoint, note=str(error))
    wanted = {key: parameter.requires_grad for key, parameter in checkpoint.model.named_parameters()}
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
    for key, parameter in checkpoint.model.named_parameters():
        parameter.requires_grad_(wanted[key])
    return replace(checkpoint, precise=True)


def existing(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, if it can be a checkpoint at all. Asked first: Ultralytics looks for missing files on the network.

    Raises Refused, naming the file, what it is and what to give.
    """
    file = Path(path)
    if "://" in str(path):
        raise Refused(f"{path} is an address", "download the file yourself and give its path")
    try:
        if file.is_dir():
            raise Refused(f"{file} is a folder", GIVE)
        if not file.exists():
            raise Refused(f"{file} does not exist (looked in {file.absolute().parent}), and nothing is downloaded", GIVE)
        if not file.is_file():
            raise Refused(f"{file} is not a regular file", GIVE)
        if file.suffix.lower() in EXPORTS:
            raise Refused(f"{file} is an exported model ({file.suffix})", "give the .pt file it was made from")
        if file.suffix.lower() not in SUFFIXES:
            raise Refused(f"{file} ends in {file.suffix or 'nothing'}, where {' or '.join(SUFFIXES)} is accepted", GIVE)
        with file.open("rb") as stream:
            start = stream.read(512)
    except Refused:
        raise
    except (OSError, ValueError) as error:
        raise Refused(f"{str(path)!r} cannot be read ({error})", "check the path and its permissions") from None
    if not start:
        raise Refused(f"{file} is empty", DAMAGED)
    if not start.startswith(b"PK"):
        kind = "a text file" if _is_text(start) else "not an archive of torch.save"
        for beginning, (known, remedy) in BEGINNINGS.items():
            if start.lstrip().startswith(beginning):
                raise Refused(f"{file} is {known}", remedy)
        raise Refused(f"{file} is {kind}", GIVE)
    return file


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)


@contextmanager
def _refusing(file: Path, addition: str) -> Iterator[None]:
    """Puts the file's name in front of every reason."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{file} is refused{addition}: {error.reason}", error.remedy) from error.__cause__
    except OSError as error:
        raise Refused(f"{file} cannot be read ({error})", "check its permissions, and the disk") from None


def as_ultralytics(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that Ultralytics' own loader gives for `path`, its model rebuilt and the rest (the state of the
    optimizer, the training's results) as plain data and tensors. Raises Refused as `load` does.
    """
    file = existing(path)
    with _refusing(file, ", and nothing in it was executed"):
        with Archive(file) as archive:
            contents = _contents(archive)
            rebuilt = _from_archive(file, archive, contents)
            others = {key: value for key, value in contents.items() if key not in ("ema", "model")}
            rest = plain(others, "the checkpoint", read=archive.tensor)
    key, other = ("ema", "model") if contents.get("ema") is not None else ("model", "ema")
    return {**rest, "train_args": rebuilt.args, key: rebuilt.model, other: None}


def _rebuilt(file: Path) -> Checkpoint:
    with Archive(file) as archive:
        return _from_archive(file, archive, _contents(archive))


def _from_archive(file: Path, archive: Archive, contents: dict[str, Any]) -> Checkpoint:
    root = _root(contents)
    args = _training_args(contents)
    model, dtype = rebuild(root, archive)
    about = {key: plain(contents.get(key), key) for key in ("epoch", "date", "version")}
    return _described(file, model, MODELS[root.cls.name], args, about, dtype)


def _contents(archive: Archive) -> dict[str, Any]:
    """What the archive holds, if that is an Ultralytics checkpoint (of which only the outside has been looked at)."""
    contents = archive.contents()
    if isinstance(contents, Stored):
        raise Refused(f"it holds {contents.cls} itself, not a checkpoint", "save it with YOLO(...).save()")
    if not isinstance(contents, dict):
        raise Refused(f"it holds a {type(contents).__name__}", GIVE)
    tensors = contents.get("state_dict", contents)
    if isinstance(tensors, dict) and tensors and all(isinstance(value, StoredTensor) for value in tensors.values()):
        raise Refused("it holds weights only (a state_dict), without the model they belong to", GIVE)
    if contents.get("modelopt") is not None:
        raise Refused("it is quantization-aware (modelopt), which changes layers while it is loaded")
    return contents


def _root(contents: dict[str, Any]) -> Stored:
    root = contents.get("ema") if contents.get("ema") is not None else contents.get("model")
    model_name(root)
    assert isinstance(root, Stored)  # model_name refuses everything else
    return root


def _training_args(contents: dict[str, Any]) -> dict[str, Any]:
    args = plain(contents.get("train_args") or {}, "train_args")
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise Refused("its train_args are not a dictionary of names")
    return args


def _names(names: Any, yaml: dict[str, Any]) -> dict[int, str]:
    """Class names by number. Ultralytics makes folders of them, so none may lead out of a folder."""
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    names = names or {index: str(index) for index in range(yaml.get("nc") or 0)}
    if not isinstance(names, dict) or not all(isinstance(key, int) and isinstance(name, str) for key, name in names.items()):
        raise Refused("its class names are not a dictionary of numbers to names")
    for name in names.values():
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or (len(parts) > 1 and not parts[0]) or "\0" in name:
            raise Refused(f"its class name {name[:100]!r} is a path out of its folder", "rename the class")
    return names


def _described(
    file: Path, model: nn.Module, task: str, args: dict[str, Any], about: dict[str, Any], dtype: torch.dtype
) -> Checkpoint:
    """The Checkpoint, and on the model what Ultralytics' own loader sets: args, task, pt_path and stride."""
    yaml = getattr(model, "yaml", {})
    names, stride = _names(getattr(model, "names", None), yaml), getattr(model, "stride", None)
    if not isinstance(stride, torch.Tensor):
        stride = torch.tensor([32.0])
    if "://" in str(args.get("data")):  # a later val() would download it, and run the code of its `download:`
        args = {key: value for key, value in args.items() if key != "data"}
    attributes = {"args": {**DEFAULT_CFG_DICT, **args}, "task": task, "pt_path": str(file), "names": names, "stride": stride}
    for name, value in attributes.items():
        setattr(model, name, value)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    epoch, date, version = about.get("epoch"), about.get("date"), about.get("version")
    return Checkpoint(
        path=file,
        model=model,
        task=task,
        yaml=yaml,
        names=names,
        stride=stride,
        args=args,
        epoch=epoch if isinstance(epoch, int) else None,
        date=date if isinstance(date, str) else None,
        version=version if isinstance(version, str) else None,
        dtype=dtype,
        digest=digest.hexdigest(),
    )


def _trusted(file: Path) -> Checkpoint:
    """The checkpoint as torch.load unpickles it. Runs the code that it holds; a missing module is named, not installed."""
    try:
        contents = _unpickle(file, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        reason = f"it needs the Python module {error.name!r}, which is not installed here"
        raise Refused(reason, "nothing is installed for you: get it from whoever gave you the file") from error
    except Exception as error:  # unpickling runs any code, which may raise anything
        raise Refused(f"torch.load fails on it ({type(error).__name__}: {error})", DAMAGED) from error
    candidate = (contents.get("ema") or contents.get("model")) if isinstance(contents, dict) else None
    if not isinstance(candidate, nn.Module) or isinstance(candidate, torch.jit.ScriptModule):
        raise Refused("it holds no model under 'ema' or 'model'", GIVE)
    dtype = next((tensor.dtype for tensor in candidate.parameters() if tensor.is_floating_point()), torch.float32)
    task = getattr(candidate, "task", None) or MODELS.get(type(candidate).__name__, "detect")
    return _described(file, candidate.float().eval(), task, dict(contents.get("train_args") or {}), contents, dtype)


def _precise_state(file: Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The FP32 weights in `file`. Raises Refused if they are not those of `checkpoint` before rounding."""
    with _refusing(file, ", and the weights of the checkpoint are kept"), Archive(file) as archive:
        contents = archive.contents()
        stored = contents.get("state_dict") if isinstance(contents, dict) else None
        rounded = checkpoint.model.state_dict()
        if not isinstance(stored, dict) or list(stored) != list(rounded):
            raise Refused("it does not hold the same weights as the checkpoint")
        state = {}
        for key, tensor in stored.items():
            if not isinstance(tensor, StoredTensor) or tensor.size != tuple(rounded[key].shape):
                raise Refused(f"{key} has another shape than in the checkpoint")
            state[key] = archive.tensor(tensor)
            if not _rounds_to(state[key], rounded[key], checkpoint.dtype):
                raise Refused(f"{key} does not round to the checkpoint's: it is of another epoch or run")
    return state


def _rounds_to(precise: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype) -> bool:
    if not precise.is_floating_point() or not rounded.is_floating_point():
        return torch.equal(precise, rounded)
    # Ultralytics 8.4 stores what overflows FP16 as the largest number, 8.3 as infinity
    return torch.equal(torch.nan_to_num(precise.to(dtype)), torch.nan_to_num(rounded.to(dtype)))

"""Files that would run code, write elsewhere or claim all memory, each made anew: the corpus of the tests of safe loading.

A builder gets the folder to write into and the path of a canary, which the file creates if its code runs.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_helpers import PROTOCOL, archive, built, contents, tiny_yaml
from torch import nn

Builder = Callable[[Path, Path], Path]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def touch(canary: Path) -> Call:
    return Call(os.system, f"touch {canary}")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def program(canary: Path, module: str = "posix", name: str = "system", protocol: int = 2) -> bytes:
    """A pickle that calls `module.name` with the command that makes the canary."""
    return bytes([0x80, protocol]) + f"c{module}\n{name}\n".encode() + text(f"touch {canary}") + b"\x85R."


def records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def packed(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return stream.getvalue()


def good(path: Path, **entries: Any) -> Path:
    torch.save(contents(built(tiny_yaml()), **entries), path)
    return path


def saved_with(change: Callable[[dict[str, Any], Path], object]) -> Builder:
    """A checkpoint of Ultralytics, changed before it is saved."""

    def build(folder: Path, canary: Path) -> Path:
        content = contents(built(tiny_yaml()))
        change(content, canary)
        torch.save(content, folder / "evil.pt")
        return folder / "evil.pt"

    return build


def written(make: Callable[[Path, list[tuple[str, bytes]]], bytes]) -> Builder:
    """A file made of the records of a good checkpoint."""

    def build(folder: Path, canary: Path) -> Path:
        path = good(folder / "evil.pt")
        path.write_bytes(make(canary, records(path)))
        return path

    return build


# ------------------------------------------------------------------------------------------------------ calls in pickles
def _in_a_state_dict(content: dict[str, Any], canary: Path) -> None:
    state = content["ema"].state_dict()
    state["model.0.conv.weight"] = touch(canary)
    content["optimizer"] = {"state": {0: {"momentum_buffer": state}}}


def _getattr_chain(content: dict[str, Any], canary: Path) -> None:
    system = Call(getattr, Call(importlib.import_module, "os"), "system")
    content["extra"] = Call(getattr, system, "__call__")


def _hook(content: dict[str, Any], canary: Path) -> None:
    content["ema"].model[0].register_forward_hook(os.system)


def _forward(content: dict[str, Any], canary: Path) -> None:
    content["ema"].model[0].__dict__["forward"] = eval


def _extra_in_front(data: bytes, extra: bytes, protocol: int = 4) -> bytes:
    """The pickle of a checkpoint with one more entry of its dictionary."""
    start = data.index(b"(") + 1
    return bytes([0x80, protocol]) + data[2:start] + text("extra") + extra + data[start:]


def _dotted(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    """From protocol 4 on a name may lead anywhere: here out of a package whose objects are dropped."""
    call = program(canary, "ultralytics.data.augment", "random._os.system")[2:-1]
    return packed([(name, _extra_in_front(data, call) if name.endswith(".pkl") else data) for name, data in entries])


def _missing_module(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    """Ultralytics installs what such a file names."""
    layer = b"cevil_package_to_install\nLayer\n)\x81"
    return packed([(name, _extra_in_front(data, layer, 2) if name.endswith(".pkl") else data) for name, data in entries])


# -------------------------------------------------------------------------------- archives that two readers read in two ways
def _other_case(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    root = entries[0][0].split("/")[0]
    return packed([(f"{root}/DATA.PKL", program(canary)), *entries])


def _two_directories(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    """Two tables of contents of one size: Python's reader takes the last one, PyTorch's the one that the end points to."""
    evil = packed([(name, program(canary) if name.endswith(".pkl") else data) for name, data in entries])
    fine = packed(entries)
    end = struct.Struct("<4s4H2LH")
    (at_evil, first), (at_fine, second) = ((file.rindex(b"PK\x05\x06"),) * 2 for file in (evil, fine))
    evil_end, fine_end = end.unpack(evil[at_evil:]), end.unpack(fine[at_fine:])
    assert evil_end[5] == fine_end[5]
    table, position = bytearray(fine[fine_end[6] : second]), 0
    shift = first - (first + second - fine_end[5] - evil_end[6])
    while position < len(table):
        lengths = struct.unpack("<HHH", table[position + 28 : position + 34])
        offset = struct.unpack("<L", table[position + 42 : position + 46])[0]
        table[position + 42 : position + 46] = struct.pack("<L", (offset + shift) % (1 << 32))
        position += 46 + sum(lengths)
    return evil[:first] + fine[: fine_end[6]] + bytes(table) + end.pack(*fine_end[:6], evil_end[6], 0)


def _tar_and_zip(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    """A tar for PyTorch's old reader, whose first name begins as a zip does, with a zip behind it for ours."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("PK", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(program(canary))
            file.addfile(info, io.BytesIO(program(canary)))
    return stream.getvalue() + packed(entries)


def _torchscript_in_disguise(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    root = entries[0][0].split("/")[0]
    return packed([*entries, (f"{root}/CONSTANTS.PKL", program(canary)), (f"{root}/CODE/__torch__.py", b"")])


def _names(*names: str) -> Builder:
    return written(lambda canary, entries: packed([*entries, *((name, program(canary)) for name in names)]))


# ------------------------------------------------------------------------------------------------------ time and memory
def _bomb(folder: Path, canary: Path) -> Path:
    return archive(folder / "evil.pt", PROTOCOL + bytes(300 << 20), compression=zipfile.ZIP_DEFLATED)


def _tensor_bomb(folder: Path, canary: Path) -> Path:
    """A deflated storage of 2 GB of zeros in 2 MB."""
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(folder / "evil.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in records(good(folder / "good.pt")):
            if not name.endswith("/data/0"):
                file.writestr(name, data)
                continue
            with file.open(name, "w", force_zip64=True) as stream:
                for _ in range(2048):
                    stream.write(zeros)
    (folder / "good.pt").unlink()
    return folder / "evil.pt"


def _overlapping(canary: Path, entries: list[tuple[str, bytes]]) -> bytes:
    """Many records that are all the same bytes, as in the bombs that need no compression."""
    data = packed([*entries, *((f"{entries[0][0].split('/')[0]}/data/9{i:03d}", b"x") for i in range(200))])
    at = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<L", data[at + 16 : at + 20])[0]
    table, position, first = bytearray(data[start:at]), 0, b""
    while position < len(table):
        first = first or table[position + 20 : position + 28]
        lengths = struct.unpack("<HHH", table[position + 28 : position + 34])
        if b"/data/9" in table[position + 46 : position + 46 + lengths[0]]:
            table[position + 20 : position + 28] = struct.pack("<LL", 1 << 26, 1 << 26)
            table[position + 42 : position + 46] = bytes(4)
        position += 46 + sum(lengths)
    return data[:start] + bytes(table) + data[at:]


def _stretched(content: dict[str, Any], canary: Path) -> None:
    weight = content["ema"].model[0].conv.weight
    with torch.no_grad():
        weight.set_(torch.zeros(1, dtype=weight.dtype).expand(1 << 20, 1 << 20))


def _large(content: dict[str, Any], canary: Path) -> None:
    content["ema"].yaml["backbone"][1][3] = [65536, 63, 2]
    content["ema"].yaml["width_multiple"] = 32.0


def _laughs(content: dict[str, Any], canary: Path) -> None:
    laugh: list[Any] = ["ha"]
    for _ in range(40):
        laugh = [laugh, laugh]
    content["train_args"]["data"] = laugh


# ---------------------------------------------------------------------------------------------------------------- YAMLs
def _activation(canary: Path) -> str:
    return f"__import__('os').system('touch {canary}') or nn.SiLU()"


def _rows(canary: Path) -> list[list[Any]]:
    return [
        [-1, 1, "torch_load", [f"{canary.parent}/pickle.pt"]],
        [-1, 1, "check_requirements", ["evil_package_to_install"]],
        [-1, 1, "Conv", [_activation(canary)]],
    ]


def _in_the_yaml(change: Callable[[dict[str, Any], Path], object]) -> Builder:
    return saved_with(lambda content, canary: change(content["ema"].yaml, canary))


def _model_yaml(change: Callable[[dict[str, Any], Path], object]) -> Builder:
    def build(folder: Path, canary: Path) -> Path:
        torch.save(touch(canary), folder / "pickle.pt")
        config = tiny_yaml()
        change(config, canary)
        (folder / "evil.yaml").write_text("\n".join(f"{key}: {value!r}" for key, value in config.items()))
        return folder / "evil.yaml"

    return build


def _data(download: Callable[[Path], str]) -> Builder:
    def build(folder: Path, canary: Path) -> Path:
        lines = download(canary).replace("\n", "\n  ")
        (folder / "evil.yaml").write_text(
            f"path: nowhere\ntrain: images\nval: images\nnames: [a, b]\ndownload: |\n  {lines}\n"
        )
        return folder / "evil.yaml"

    return build


def cached(folder: Path, canary: Path) -> Path:
    """Pictures with a label cache beside them, which is a pickle."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "images" / "0.png")
    (folder / "labels" / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with (folder / "labels.cache").open("wb") as file:
        np.save(file, np.array({"evil": touch(canary)}, dtype=object), allow_pickle=True)
    (folder / "evil.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [a, b]\n")
    return folder / "evil.yaml"


def _ndjson(folder: Path, canary: Path) -> Path:
    (folder / "evil.ndjson").write_text('{"type": "dataset", "task": "detect", "name": "x", "class_names": {"0": "a"}}\n')
    return folder / "evil.ndjson"


CHECKPOINTS: dict[str, Builder] = {
    "os.system": saved_with(lambda content, canary: content.update(extra=touch(canary))),
    "eval in the arguments": saved_with(
        lambda content, canary: content["train_args"].update(data=Call(eval, f"open({str(canary)!r}, 'w').close()"))
    ),
    "exec in place of the model": saved_with(
        lambda content, canary: content.update(ema=Call(exec, f"open({str(canary)!r}, 'w').close()"))
    ),
    "importlib in the optimizer": saved_with(
        lambda content, canary: content.update(optimizer={"state": [Call(importlib.import_module, "antigravity")]})
    ),
    "nested in a state dict": saved_with(_in_a_state_dict),
    "a state dict alone": lambda folder, canary: _only({"model.0.conv.weight": touch(canary)}, folder),
    "a chain of getattr": saved_with(_getattr_chain),
    "a pickle in a pickle": saved_with(
        lambda content, canary: content.update(extra=Call(pickle.loads, pickle.dumps(touch(canary))))
    ),
    "a hook": saved_with(_hook),
    "a function as forward": saved_with(_forward),
    "a layer that holds another": saved_with(lambda content, canary: content["ema"].model[1].__dict__.update(x=nn.SiLU())),
    "a dotted name": written(_dotted),
    "a module to be installed": written(_missing_module),
    "a pickle of protocol 4": lambda folder, canary: _bytes(folder, program(canary, protocol=4)),
    "a pickle of protocol 0": lambda folder, canary: _bytes(folder, f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()),
    "a name in another case": written(_other_case),
    "two tables of contents": written(_two_directories),
    "a tar that is a zip": written(_tar_and_zip),
    "TorchScript in disguise": written(_torchscript_in_disguise),
    "a path out of the archive": _names("../../canary"),
    "a path from the root": _names("/tmp/canary"),
    "a path of Windows": _names("..\\..\\canary"),
    "a path out of a folder": _names("evil/../../../canary"),
    "two pickles": _names("other/data.pkl"),
    "a class name that is a path": saved_with(lambda content, canary: setattr(content["ema"], "names", {0: "../../canary"})),
    "a deflated pickle of 300 MB": _bomb,
    "a deflated tensor of 2 GB": _tensor_bomb,
    "overlapping records": written(_overlapping),
    "a tensor of 10^12 equal numbers": saved_with(_stretched),
    "a layer of 10^11 weights": saved_with(_large),
    "a billion laughs": saved_with(_laughs),
    "an activation that is code": _in_the_yaml(lambda yaml, canary: yaml.update(activation=_activation(canary))),
    **{
        f"row {number} calls a function": _in_the_yaml(
            lambda yaml, canary, number=number: yaml["backbone"].__setitem__(1, _rows(canary)[number])
        )
        for number in range(3)
    },
}
MODELS: dict[str, Builder] = {
    "an activation that is code": _model_yaml(lambda yaml, canary: yaml.update(activation=_activation(canary))),
    **{
        f"row {number} calls a function": _model_yaml(
            lambda yaml, canary, number=number: yaml["backbone"].__setitem__(1, _rows(canary)[number])
        )
        for number in range(3)
    },
}
DATA: dict[str, Builder] = {
    "python in download": _data(lambda canary: f"import os\nos.system('touch {canary}')"),
    "bash in download": _data(lambda canary: f"bash -c touch${{IFS}}{canary}"),
    "an address in download": _data(lambda canary: "https://localhost:1/evil.zip"),
    "a list of addresses": _ndjson,
}


def _only(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "evil.pt")
    return folder / "evil.pt"


def _bytes(folder: Path, data: bytes) -> Path:
    (folder / "evil.pt").write_bytes(data)
    return folder / "evil.pt"

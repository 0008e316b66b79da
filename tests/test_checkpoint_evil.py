"""Bad checkpoints: each is refused with its reason, nothing in it runs, and nothing is installed or fetched for it."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import pickletools
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import PROTOCOL, archive, built, contents, refused, saved, tiny_yaml
from torch import nn
from ultralytics.utils import checks, downloads

from rep_backbones.yolo import checkpoint, unpickle


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    return built(tiny_yaml())


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that the payloads below create; every test that takes it fails if one did."""
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def nothing_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No test may start a process, install, or open a connection; and no canary may exist at its end."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"code ran: {args}")

    for owner, name in (
        (socket.socket, "connect"),
        (subprocess, "Popen"),
        (checks, "check_requirements"),
        (downloads, "attempt_download_asset"),
        (torch.hub, "load_state_dict_from_url"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    yield
    assert not (tmp_path / "canary").exists(), "code of the file ran"


# ------------------------------------------------------------------------------------------------- code in the pickle
class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


CALLS: dict[str, Callable[[str], Any]] = {
    "posix.system": lambda path: Call(os.system, f"touch {path}"),
    "builtins.eval": lambda path: Call(eval, f"__import__('pathlib').Path({path!r}).touch()"),
    "builtins.exec": lambda path: Call(exec, f"open({path!r}, 'w')"),
    "builtins.__import__": lambda path: Call(__import__, "this"),
    "io.open": lambda path: Call(open, path, "w"),
    "the attribute 'touch' of a value": lambda path: Call(getattr, Path(path), "touch"),
    "subprocess.run": lambda path: Call(importlib.import_module("subprocess").run, ["touch", path]),
    "importlib.import_module": lambda path: Call(importlib.import_module, "antigravity"),
    "torch.hub.load": lambda path: Call(torch.hub.load, "evil/repo", "model"),
    "torch.serialization.load": lambda path: Call(torch.load, path),
    "numpy.load": lambda path: Call(np.load, path, None, True),
    "pickle.loads": lambda path: Call(pickle.loads, pickle.dumps(0)),
    "functools.partial": lambda path: functools.partial(os.system, f"touch {path}"),
    "builtins.__import__, called within a call": lambda path: Call(getattr, Call(__import__, "os"), "system"),
    "the attribute '__init__' of the name torch.nn.modules.conv.Conv2d": lambda path: Call(getattr, nn.Conv2d, "__init__"),
    "ultralytics.utils.patches.torch_load": lambda path: Call(_task("torch_load"), path),
    "ultralytics.nn.tasks.yaml_model_load": lambda path: Call(_task("yaml_model_load"), path),
    "rep_backbones.yolo.checkpoint.load": lambda path: Call(checkpoint.load, path),
    "_wrapped_call_impl": lambda path: Call(nn.Module.__call__, 0),
    "torch.nn.modules.linear.Identity": lambda path: Call(nn.Identity),
    "torch._utils._rebuild_wrapper_subclass": lambda path: Call(torch._utils._rebuild_wrapper_subclass, 0),
}


def _task(name: str) -> Any:
    return getattr(importlib.import_module("ultralytics.nn.tasks"), name)


PLACES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "at the top": lambda content, evil: content.update(extra=evil),
    "in the arguments": lambda content, evil: content["train_args"].update(data=evil),
    "in the yaml": lambda content, evil: content["ema"].yaml.update(nc=evil),
    "in a layer": lambda content, evil: content["ema"].model[0].__dict__.update(forward=evil),
    "in the optimizer": lambda content, evil: content.update(optimizer={"state": [evil]}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_and_not_made(call: str, tiny: nn.Module, tmp_path: Path, canary: Path) -> None:
    for number, place in enumerate(PLACES.values()):
        content = contents(tiny)
        place(content, CALLS[call](str(canary)))
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        message = refused(path)
        assert "nothing in it was executed" in message and call.split(",")[0] in message


@pytest.mark.parametrize("function", [os.system, eval, torch.load, nn.functional.relu, Call], ids=lambda f: f.__name__)
def test_a_name_alone_is_refused(function: Any, tiny: nn.Module, tmp_path: Path) -> None:
    assert f"it refers to {function.__module__}" in refused(saved(tmp_path / "evil.pt", tiny, extra=function))


@pytest.mark.parametrize("call", ["posix.system", "builtins.eval"])
def test_the_same_file_does_run_when_unpickled(call: str, tiny: nn.Module, tmp_path: Path, canary: Path) -> None:
    """So that the sweep above refuses something real: torch.load, and `trust`, run these files."""
    path = saved(tmp_path / "evil.pt", tiny, extra=CALLS[call](str(canary)))
    for run in (lambda: torch.load(path, weights_only=False), lambda: checkpoint.load(path, trust=True)):
        run()
        assert canary.exists()
        canary.unlink()


def op(*names: str) -> bytes:
    """Pickle instructions by name, those with a text argument as `name:argument`."""
    codes = {code.name: code.code.encode("latin1") for code in pickletools.opcodes}
    program = b""
    for name in names:
        code, _, argument = name.partition(":")
        if code == "GLOBAL":
            program += codes[code] + argument.replace(" ", "\n").encode() + b"\n"
        elif code == "BINUNICODE":
            program += codes[code] + struct.pack("<I", len(argument)) + argument.encode()
        elif code in ("BINPUT", "BINGET", "BININT1"):
            program += codes[code] + bytes([int(argument)])
        else:
            program += codes[code]
    return program


SYSTEM, LINEAR = "GLOBAL:posix system", "GLOBAL:torch.nn.modules.linear Linear"
ORDERED, REBUILD = "GLOBAL:collections OrderedDict", "GLOBAL:torch._utils _rebuild_tensor_v2"
PROGRAMS: dict[str, tuple[bytes, str]] = {  # a pickle, and why it is refused
    "protocol 0": (b"cposix\nsystem\n(S'touch canary'\ntR.", "posix.system"),
    "types.CodeType": (op("GLOBAL:types CodeType", "EMPTY_TUPLE", "REDUCE", "STOP"), "types.CodeType"),
    "a name as in Python 2": (op("GLOBAL:__builtin__ eval", "BINUNICODE:1", "TUPLE1", "REDUCE", "STOP"), "builtins.eval"),
    "INST": (b"(X\x01\x00\x00\x00xiposix\nsystem\n.", "instruction b'i'"),
    "OBJ": (op("MARK", LINEAR, "NONE") + b"o.", "instruction b'o'"),
    "STACK_GLOBAL": (b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93.", "instruction"),
    "EXT1": (b"\x82\x01.", "instruction"),
    "NEWOBJ of a function": (op(SYSTEM, "EMPTY_TUPLE", "NEWOBJ", "STOP"), "posix.system"),
    "NEWOBJ of data": (op(REBUILD, "EMPTY_TUPLE", "NEWOBJ", "STOP"), "makes an object"),
    "BUILD on a type of dictionary": (op(ORDERED, "EMPTY_DICT", "BUILD", "STOP"), "sets attributes"),
    "BUILD on a list": (op("EMPTY_LIST", "EMPTY_DICT", "BUILD", "STOP"), "sets attributes"),
    "BUILD on a tensor's rebuilder": (op(REBUILD, "EMPTY_DICT", "BUILD", "STOP"), "sets attributes"),
    "BUILD on a layer's class": (op(LINEAR, "EMPTY_DICT", "BUILD", "STOP"), "sets attributes"),
    "a call of a result": (op(ORDERED, "EMPTY_TUPLE", "REDUCE", "EMPTY_TUPLE", "REDUCE", "STOP"), "not a name"),
    "a call of a text": (op("BINUNICODE:os.system", "EMPTY_TUPLE", "REDUCE", "STOP"), "not a name"),
    "a call of a number type": (op("GLOBAL:torch float16", "EMPTY_TUPLE", "REDUCE", "STOP"), "not a name"),
    "a call without a tuple": (op(ORDERED, "EMPTY_LIST", "REDUCE", "STOP"), "not a name"),
    "a call of a storage": (op("GLOBAL:torch FloatStorage", "EMPTY_TUPLE", "REDUCE", "STOP"), "calls torch.FloatStorage"),
    "a dotted name": (op("GLOBAL:torch.nn.modules.linear Linear.__init__", "STOP"), "Linear.__init__"),
    "a dunder name": (op("GLOBAL:torch.nn.modules.linear __builtins__", "STOP"), "__builtins__"),
    "a module in a module": (op("GLOBAL:torch.nn.modules.linear torch", "STOP"), "linear.torch"),
    "a module not imported": (op("GLOBAL:ultralytics.nn.modules.evil Layer", "STOP"), "evil.Layer"),
    "a similar name": (op("GLOBAL:torch.nn.modules_evil Layer", "STOP"), "modules_evil.Layer"),
    "appending to a tuple": (op("EMPTY_TUPLE", "NONE", "APPEND", "STOP"), "not a list"),
    "an odd number of items": (op("EMPTY_DICT", "MARK", "NONE", "SETITEMS", "STOP"), "damaged"),
    "a list as a key": (op("EMPTY_DICT", "EMPTY_LIST", "NONE", "SETITEM", "STOP"), "key is not a scalar"),
    "a set of lists": (
        op("GLOBAL:builtins set", "EMPTY_LIST", "EMPTY_LIST", "APPEND", "TUPLE1", "REDUCE", "STOP"),
        "a list of scalars",
    ),
    "an outside object": (op("BINUNICODE:/etc/passwd", "BINPERSID", "STOP"), "outside object"),
    "nothing": (b"", "damaged"),
    "an empty stack": (op("STOP"), "damaged"),
    "a memory never written": (op("BINGET:7", "STOP"), "damaged"),
    "a text without an end": (b"X\xff\xff\xff\x7fabc.", "damaged"),
    "a name without an end": (b"cposix", "damaged"),
    "a tuple of too few": (op("NONE", "TUPLE3", "STOP"), "damaged"),
    "a mark without a start": (op("MARK", "TUPLE", "TUPLE", "STOP") + b"t.", "damaged"),
    "not a dictionary": (op("EMPTY_LIST", "STOP"), "it holds a list"),
    "a lone name": (op(LINEAR, "STOP"), "it holds"),
    "a lone object": (op(LINEAR, "EMPTY_TUPLE", "NEWOBJ", "STOP"), "Linear itself"),
    "an empty dictionary": (op("EMPTY_DICT", "STOP"), "no model"),
    "very many lists in lists": (b"]" * 300_000 + b"a" * 299_999 + b".", "it holds a list"),
    "very many tuples as a key": (b"})" + b"\x85" * 300_000 + b"Ns.", "key is not a scalar"),
    "very many tuples in a set": (b"c__builtin__\nset\n])" + b"\x85" * 300_000 + b"a\x85R.", "a list of scalars"),
    "a list that holds itself": (b"}X\x03\x00\x00\x00ema]q\x01h\x01as.", "no model"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_crafted_pickle_is_refused(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, reason = PROGRAMS[program]
    assert reason in refused(archive(tmp_path / "evil.pt", PROTOCOL + data))


def test_an_endless_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_INSTRUCTIONS", 1000)
    assert "1,000 instructions" in refused(archive(tmp_path / "evil.pt", PROTOCOL + b"N" * 2000 + b"."))
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 1000)
    assert "1,000 bytes" in refused(archive(tmp_path / "evil.pt", PROTOCOL + b"N" * 2000 + b"."))


def tensor_program(numel: str, offset: str, size: str, stride: str) -> bytes:
    """A state dict of one float tensor in storage 0."""
    storage = "(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + numel + "tQ"
    tensor = "ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + "\x89NtR"
    return PROTOCOL + b"}X\x03\x00\x00\x00ema" + tensor.encode("latin1") + b"s."


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (("K\x04", "K\x00", "J\xff\xff\xff\x7f\x85", "K\x00\x85"), "does not fit"),  # two thousand million copies of one
        (("K\x04", "K\x00", "K\x04\x85", "K\x02\x85"), "does not fit"),  # beyond the end
        (("K\x04", "K\x04", "K\x01\x85", "K\x01\x85"), "does not fit"),
        (("K\x04", "J\xff\xff\xff\xff", "K\x01\x85", "K\x01\x85"), "a tensor takes"),  # before the start
        (("K\x04", "K\x00", "K\x02\x85", "J\xff\xff\xff\xff\x85"), "non-negative"),
        (("K\x04", "K\x00", "K\x02\x85", ")"), "a tensor takes"),
        (("J\xff\xff\xff\xff", "K\x00", "K\x01\x85", "K\x01\x85"), "a storage called '0'"),
        (("N", "K\x00", "K\x01\x85", "K\x01\x85"), "a storage called '0'"),
        (("K\x04", "K\x00", "K\x04\x85", "K\x01\x85"), "weights only"),  # this one is well
    ],
)
def test_a_tensor_outside_its_storage_is_refused(numbers: tuple[str, str, str, str], reason: str, tmp_path: Path) -> None:
    assert reason in refused(archive(tmp_path / "evil.pt", tensor_program(*numbers), {"x/data/0": bytes(16)}))


def test_one_list_in_every_layer_is_not_walked_again_and_again(tiny: nn.Module, tmp_path: Path) -> None:
    content, numbers = contents(tiny), list(range(20_000))
    for module in content["ema"].modules():
        module.__dict__["numbers"] = numbers
    torch.save(content, tmp_path / "evil.pt")
    assert "values" in refused(tmp_path / "evil.pt", checked=False)


def test_a_billion_laughs_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    laugh: list[Any] = ["ha"]
    for _ in range(40):
        laugh = [laugh, laugh]
    for number, entries in enumerate(({"train_args": {"data": laugh}}, {"date": laugh})):
        assert "values" in refused(saved(tmp_path / f"{number}.pt", tiny, **entries), checked=False)


# ------------------------------------------------------------------------------------------------- code in the model
def _shadow(model: nn.Module) -> None:
    model.model[0].__dict__["forward"] = nn.SiLU()


def _foreign_forward(model: nn.Module) -> None:
    model.model[0].__dict__["forward"] = model.model[1].forward_fuse


def _other_method(model: nn.Module) -> None:
    model.model[0].__dict__["forward"] = model.model[0].requires_grad_


def _hook(model: nn.Module) -> None:
    model.model[1].register_forward_hook(nn.SiLU())


def _module_attribute(model: nn.Module) -> None:
    model.model[1].__dict__["helper"] = [nn.SiLU()]


def _cycle(model: nn.Module) -> None:
    model.model[1]._modules["conv"] = model.model[1]


def _fused_cycle(model: nn.Module) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 1))
    layer._modules["1"] = layer
    layer.__dict__.update(f=-1, i=0)
    model.model._modules["0"] = layer


def _deep(model: nn.Module) -> None:
    layer: nn.Module = nn.Identity()
    for _ in range(70):
        layer = nn.Sequential(layer)
    layer.__dict__.update(f=-1, i=0)
    model.model._modules["0"] = layer


def _two_children_each(model: nn.Module) -> None:
    layer: nn.Module = nn.Identity()
    for _ in range(40):
        layer = nn.Sequential(layer, layer)
    layer.__dict__.update(f=-1, i=0)
    model.model._modules["0"] = layer


def _other_rows(model: nn.Module) -> None:
    model.yaml["head"][0][0] = 1


def _more_rows(model: nn.Module) -> None:
    model.yaml["backbone"].append([-1, 1, "Conv", [16, 1, 1]])


def _other_layer(model: nn.Module) -> None:
    model.yaml["backbone"][2] = [-1, 1, "Conv", [16, 3, 1]]


def _other_width(model: nn.Module) -> None:
    model.yaml["backbone"][0][3] = [16, 3, 2]


def _missing_weight(model: nn.Module) -> None:
    model.model[0].bn._buffers["running_mean"] = None


def _unexpected_weight(model: nn.Module) -> None:
    model.model[0].conv._parameters["bias"] = nn.Parameter(torch.zeros(8))


def _tensor_for_a_layer(model: nn.Module) -> None:
    model.model[0]._modules["act"] = nn.Parameter(torch.zeros(1))


def _no_yaml(model: nn.Module) -> None:
    del model.yaml


def _second_model(model: nn.Module) -> None:
    model._modules["other"] = nn.Identity()


def _name_out_of_the_folder(model: nn.Module) -> None:
    model.names = {0: "../../etc", 1: "b"}


def _names_of_objects(model: nn.Module) -> None:
    model.names = {0: torch.zeros(1)}


TAMPERINGS = {
    _shadow: "forward",
    _foreign_forward: "forward_fuse",
    _other_method: "requires_grad_",
    _hook: "hooks",
    _module_attribute: "helper",
    _cycle: "conv",
    _fused_cycle: "itself",
    _deep: "deep",
    _two_children_each: "",
    _other_rows: "input",
    _more_rows: "rows",
    _other_layer: "model.2",
    _other_width: "shape",
    _missing_weight: "missing model.0.bn.running_mean",
    _unexpected_weight: "unexpected model.0.conv.bias",
    _tensor_for_a_layer: "act",
    _no_yaml: "YAML",
    _second_model: "other",
    _name_out_of_the_folder: "etc",
    _names_of_objects: "names",
}


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_a_tampered_model_is_refused(tamper: Callable[[nn.Module], None], tiny: nn.Module, tmp_path: Path) -> None:
    content = contents(tiny)
    tamper(content["ema"])
    torch.save(content, tmp_path / "evil.pt")
    assert TAMPERINGS[tamper] in refused(tmp_path / "evil.pt", checked=False)


def test_a_model_that_is_not_rebuilt_is_refused_with_the_reason(tiny: nn.Module, tmp_path: Path) -> None:
    content = contents(tiny)
    content["ema"].__class__ = _task("WorldModel")
    torch.save(content, tmp_path / "world.pt")
    assert "text encoder" in refused(tmp_path / "world.pt") and "--trust" in refused(tmp_path / "world.pt")
    content["ema"] = nn.Linear(2, 2)
    torch.save(content, tmp_path / "linear.pt")
    assert "DetectionModel" in refused(tmp_path / "linear.pt")


def test_many_tensors_of_one_storage_are_not_read_again_and_again(tiny: nn.Module, tmp_path: Path) -> None:
    content = contents(tiny)
    large = torch.zeros(1 << 18)
    for module in content["ema"].modules():
        for number in range(10):
            module.__dict__[f"extra{number}"] = large.view(1 << (18 - number), -1)  # distinct views of one storage
    torch.save(content, tmp_path / "evil.pt")
    assert "more bytes than the file has" in refused(tmp_path / "evil.pt", checked=False)


# -------------------------------------------------------------------------------------------------- code in the yaml
ACTIVATIONS = [
    "__import__('os').system('touch canary')",
    "open('canary', 'w')",
    "nn.SiLU(open('canary', 'w'))",
    "nn.SiLU(inplace=open('canary', 'w'))",
    "nn.Linear(100000, 100000)",
    "nn.ReLU",
    "nn.Module()",
    "nn.ReLU().__class__()",
    "nn.ReLU(**{'inplace': True})",
    "nn.ReLU(**None)",
    "nn.ELU(1e300)",
    "nn.ELU('x')",
    "torch.hub.load('a', 'b')",
    "torch.nn.functional.relu()",
    "evil.nn.ReLU()",
    "(lambda: nn.ReLU())()",
    "nn.ReLU() if open('canary', 'w') else 0",
    "nn.ReLU(); open('canary', 'w')",
    "nn.ReLU() # " + "x" * 200,
    "(" * 500,
    "\0",
    "",
    7,
    ["nn.ReLU()"],
]
ROWS: list[Any] = [
    [-1, 1, "torch_load", ["canary"]],
    [-1, 1, "check_requirements", ["evil"]],
    [-1, 1, "eval", ["open('canary', 'w')"]],
    [-1, 1, "yaml_model_load", ["x.yaml"]],
    [-1, 1, "DetectionModel", ["x.yaml"]],
    [-1, 1, "TorchVision", [512, "resnet18", "DEFAULT", True, 2]],
    [-1, 1, "torchvision.ops.DeformConv2d", [8, 8, 3]],
    [-1, 1, "nn.functional.relu", []],
    [-1, 1, "nn.modules", []],
    [-1, 1, "nn.Module.__init__", []],
    [-1, 1, "nn.DataParallel", []],
    [-1, 1, "__builtins__", []],
    [-1, 1, "os", []],
    [-1, 1, None, []],
    [-1, 1, ["Conv"], []],
    [-1, 1, "Conv", ["__import__('os').system('touch canary')"]],
    [-1, 1, "Conv", [8, "d"]],
    [-1, 1, "Conv", [8, 3, 2, None, 1, 1, "open('canary', 'w')"]],
    [-1, 1, "Conv", [10**9, 3, 2]],
    [-1, 1, "Conv", [float("nan")]],
    [-1, 1, "Conv", [[[[[[8]]]]]]],
    [-1, 1, "Conv", 8],
    [-1, 10**6, "Conv", [8]],
    [-1, 0, "Conv", [8]],
    [-1, "n", "Conv", [8]],
    [9, 1, "Conv", [8]],
    [-9, 1, "Conv", [8]],
    ["x", 1, "Conv", [8]],
    [[], 1, "Conv", [8]],
    [-1, 1, "Conv"],
    "Conv",
]
KEYS: list[tuple[str, Any]] = [
    ("nc", 10**9),
    ("nc", "open('canary')"),
    ("channels", -1),
    ("reg_max", 10**7),
    ("width_multiple", 1e6),
    ("depth_multiple", float("inf")),
    ("scales", {"n": [1, 1e9, 1024]}),
    ("scales", {"n": [1, 1]}),
    ("scales", [1, 2, 3]),
    ("scale", 3),
    ("kpt_shape", ["x", object]),
    ("backbone", []),
    ("backbone", None),
    ("head", "Detect"),
    ("head", [[-1, 1, "Conv", [8]]] * 2000),
]


def _with_yaml(tiny: nn.Module, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = contents(tiny)
    change(content["ema"].yaml)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_that_is_not_one_is_refused(
    activation: Any, tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _with_yaml(tiny, tmp_path / "evil.pt", lambda yaml: yaml.update(activation=activation))
    assert "nn.SiLU()" in refused(path)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_that_is_not_one_is_refused(
    row: Any, tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _with_yaml(tiny, tmp_path / "evil.pt", lambda yaml: yaml["backbone"].__setitem__(1, row))
    assert "row 1" in refused(path)


def test_a_layer_that_downloads_weights_is_refused_with_the_reason(tiny: nn.Module, tmp_path: Path) -> None:
    row = [-1, 1, "TorchVision", [16]]
    path = _with_yaml(tiny, tmp_path / "evil.pt", lambda yaml: yaml["backbone"].__setitem__(1, row))
    assert "downloads weights" in refused(path)


@pytest.mark.parametrize(("key", "value"), KEYS, ids=str)
def test_a_key_out_of_bounds_is_refused(key: str, value: Any, tiny: nn.Module, tmp_path: Path) -> None:
    refused(_with_yaml(tiny, tmp_path / "evil.pt", lambda yaml: yaml.update({key: value})))


def test_the_widest_yaml_that_is_accepted_claims_no_memory(tiny: nn.Module, tmp_path: Path) -> None:
    def wide(yaml: dict[str, Any]) -> None:
        yaml["backbone"][1][3] = [65536, 63, 2]  # 2 million channels by width: a tensor of 200 thousand million numbers
        yaml["width_multiple"] = 32.0

    assert "shape" in refused(_with_yaml(tiny, tmp_path / "evil.pt", wide), checked=False)

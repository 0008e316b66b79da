"""Checks a model's YAML before Ultralytics' parser sees it, because that parser executes what it reads.

It calls `eval` on `activation:`, and calls whatever name of its module a row gives: `torch_load` runs a pickle, and
`check_requirements` reaches pip. Here a row may only name a layer, and its arguments may only be values.
"""

from __future__ import annotations

import ast
import difflib
import math
from typing import Any

from torch import nn
from ultralytics.nn import tasks

from rep_backbones.registry import KNOWN
from rep_backbones.yolo import expanding
from rep_backbones.yolo.allowed import within
from rep_backbones.yolo.plain_data import Refused, plain

MAX_ROWS = 1000
MAX_REPEATS = 128
MAX_NUMBER = 1 << 16  # channels, classes (ImageNet-21k has 21,841), kernel sizes
MAX_SCALE = 64.0  # width and depth multiples
ACTIVATIONS = frozenset(
    name
    for name, cls in vars(nn).items()
    if isinstance(cls, type) and cls.__module__ == nn.ReLU.__module__ and name != "MultiheadAttention"
) | {"Identity"}
# Strings that rows may hold: Ultralytics replaces the first group by the YAML's own value, literals by their value.
WORDS = ACTIVATIONS | {"nc", "kpt_shape", "reg_max", "end2end", "None", "True", "False"}
WORDS |= {"nearest", "bilinear", "bicubic", "zeros", "reflect", "replicate", "circular", "same", "valid"}
FETCHES = {"TorchVision": "it downloads weights when it is built"}
COUNTS = ("nc", "channels", "ch", "reg_max")
MULTIPLES = ("depth_multiple", "width_multiple")


def validated(config: Any) -> dict[str, Any]:
    """A copy of the model YAML `config` as plain data that is safe to parse, as the file has it otherwise.

    Raises Refused, naming the key or the row, what was given and what is accepted.
    """
    config = plain(config, "the model's YAML")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), list) for part in ("backbone", "head")):
        raise Refused("the model's YAML has no lists `backbone` and `head`")
    for key in COUNTS:
        if config.get(key) is not None and not _is_count(config[key]):
            raise Refused(f"the model's YAML gives {key}: {config[key]!r}; accepted is 1 to {MAX_NUMBER}")
    for key in MULTIPLES:
        if key in config and not _is_multiple(config[key]):
            raise Refused(f"the model's YAML gives {key}: {config[key]!r}; accepted is a number up to {MAX_SCALE:g}")
    if config.get("kpt_shape") is not None:
        _check_argument("the model's YAML (kpt_shape)", config["kpt_shape"])
    _check_scales(config)
    if config.get("activation") is not None:
        check_activation(config["activation"])
    for request in expanding.requests(config):
        for name, value in request.items():
            _check_expansion(name, value)
    rows = config["backbone"] + config["head"]
    if not 0 < len(rows) <= MAX_ROWS:
        raise Refused(f"the model's YAML has {len(rows)} rows; accepted are 1 to {MAX_ROWS}")
    for index, row in enumerate(rows):
        _check_row(index, row)
    return config


def check_activation(text: Any, where: str = "the model's YAML gives activation:") -> None:
    """Raises Refused unless `text` is one call of an activation of torch.nn with literal arguments, as `nn.ELU(alpha=0.5)`.

    Ultralytics evaluates this string; a text that passes evaluates to nothing but that activation.
    """
    accepted = "accepted is one activation of torch.nn with literal arguments, such as nn.SiLU() or torch.nn.LeakyReLU(0.1)"
    refused = Refused(f"{where} {str(text)[:100]!r}; {accepted}")
    if not isinstance(text, str) or len(text) > 100:
        raise refused
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refused from None
    if not isinstance(call, ast.Call):
        raise refused
    prefix, _, name = ast.unparse(call.func).rpartition(".")
    if prefix not in ("nn", "torch.nn") or name not in ACTIVATIONS:
        raise refused
    for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
        sign = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub)
        literal = value.operand if sign and isinstance(value, ast.UnaryOp) else value
        if not isinstance(literal, ast.Constant) or not (literal.value is None or _is_number(literal.value)):
            raise refused
    if any(keyword.arg is None for keyword in call.keywords):
        raise refused


def _check_scales(config: dict[str, Any]) -> None:
    scales, scale = config.get("scales"), config.get("scale")
    if scales:
        if not isinstance(scales, dict) or not all(isinstance(name, str) for name in scales):
            raise Refused("the model's YAML gives `scales` that are not a mapping of letters")
        for name, values in scales.items():
            whole = isinstance(values, (list, tuple)) and len(values) == 3 and all(_is_number(value) for value in values)
            if not (whole and _is_multiple(values[0]) and _is_multiple(values[1]) and values[2] >= 1):
                accepted = f"accepted is [depth, width, max_channels], depth and width up to {MAX_SCALE:g}"
                raise Refused(f"the model's YAML gives the scale {name}: {str(values)[:100]}; {accepted}")
        if scale and scale not in scales:
            raise Refused(f"the model's YAML gives scale: {scale!r}, which is none of its scales {', '.join(scales)}")
    elif scale is not None and not isinstance(scale, str):
        raise Refused(f"the model's YAML gives scale: {scale!r}; accepted is a letter")


def _check_expansion(name: str, value: Any) -> None:
    values = value if isinstance(value, (list, tuple)) else [value]
    flat = [item for v in values for item in (v if isinstance(v, (list, tuple)) else [v])]
    for item in flat:
        whole = type(item) is not int or abs(item) <= MAX_REPEATS
        if not isinstance(item, (str, int, float, bool)) or not whole or len(flat) > MAX_NUMBER:
            raise Refused(
                f"the model's YAML gives expand: {name}: {str(value)[:100]}; accepted are names, patterns and numbers up to "
                f"{MAX_REPEATS}"
            )


def _check_row(index: int, row: Any) -> None:
    if not isinstance(row, (list, tuple)) or len(row) != 4:
        accepted = "accepted is [from, repeats, layer, [arguments]]"
        raise Refused(f"row {index} of the model's YAML is {str(row)[:100]}; {accepted}")
    source, repeats, name, args = row
    sources = source if isinstance(source, (list, tuple)) else [source]
    if not sources or not all(type(item) is int and -index - 1 <= item < index for item in sources):
        raise Refused(f"row {index} of the model's YAML ({name}) takes its input from {source!r}; accepted are earlier rows")
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise Refused(f"row {index} of the model's YAML ({name}) repeats {repeats!r} times; accepted is 1 to {MAX_REPEATS}")
    if not isinstance(args, (list, tuple)):
        raise Refused(f"row {index} of the model's YAML ({name}) has the arguments {args!r}; accepted is a list")
    _check_layer(index, name)
    for arg in args:
        _check_argument(f"row {index} of the model's YAML ({name})", arg, own=name in KNOWN)


def _check_layer(index: int, name: Any) -> None:
    """Raises Refused unless `name` is a layer: a registered one, an nn.Module of ultralytics.nn.modules, or nn.<layer>."""
    where = f"row {index} of the model's YAML names {str(name)[:100]!r}"
    if not isinstance(name, str):
        raise Refused(f"{where}; accepted is the name of a layer")
    if name in FETCHES:
        raise Refused(f"{where}: {FETCHES[name]}")
    if name in KNOWN:
        return
    if name.startswith("nn."):
        found, package = getattr(nn, name[3:], None), "torch.nn.modules"
    else:
        found, package = vars(tasks).get(name), "ultralytics.nn.modules"
    if isinstance(found, type) and issubclass(found, nn.Module) and within(found.__module__, (package,)):
        return
    stock = [key for key, value in vars(tasks).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(name, [*KNOWN, *stock], n=3)
    hint = f"; near names: {', '.join(near)}" if near else ""
    raise Refused(
        f"{where}, which is not a layer of ultralytics.nn.modules or torch.nn, and is not registered{hint}",
        "if it is a layer of yours, import the file that registers it (rep_backbones.register_layer) first",
    )


def _check_argument(where: str, value: Any, depth: int = 0, own: bool = False) -> None:
    """Raises Refused unless `value` is a value; layers that were registered (`own`) may also take words of their own."""
    if isinstance(value, (list, tuple)) and depth < 3 and len(value) <= 64:
        for item in value:
            _check_argument(where, item, depth + 1, own)
    elif isinstance(value, dict) and depth == 0 and all(isinstance(key, str) and key.isidentifier() for key in value):
        for item in value.values():
            _check_argument(where, item, depth + 1, own)
    elif isinstance(value, str):
        own_word = own and len(value) <= 64 and value.removeprefix("torch.").removeprefix("nn.").isidentifier()
        if value not in WORDS and not own_word:
            check_activation(value, f"{where} has the argument")
    elif not (value is None or _is_number(value)):
        raise Refused(
            f"{where} has the argument {str(value)[:100]!r}; accepted are numbers up to {MAX_NUMBER}, True, False, None, "
            "lists of them, and words such as 'nearest', 'nc' or an activation of torch.nn"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and abs(value) <= MAX_NUMBER


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_NUMBER


def _is_multiple(value: Any) -> bool:
    return _is_number(value) and 0 < value <= MAX_SCALE

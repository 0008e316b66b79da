"""Makes this package's layers and models known to the installed Ultralytics, in memory: no file of it is edited.

What is wrapped: `nn.tasks.parse_model`, `check_yaml`, `yaml_model_load` and `guess_model_scale` (layers and models by
name), `BaseModel.fuse` and `is_fused`, `AutoBackend` where it fuses the caller's own model, `utils.dist.generate_ddp_file`
(workers import this package), `load_checkpoint` and `BaseTrainer.setup_model` (pretrained weights of other people). Each
wrapper calls what it replaced, so it stands beside others.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import nn
from ultralytics import nn as ultralytics_nn
from ultralytics.engine import model as engine_model
from ultralytics.engine import trainer as engine_trainer
from ultralytics.nn import tasks
from ultralytics.nn.modules import Detect
from ultralytics.utils import YAML, dist

from rep_backbones import backbones, blocks, containers
from rep_backbones.expand import Expanded
from rep_backbones.online import Online
from rep_backbones.registry import KNOWN
from rep_backbones.yolo import fusing, names, pretrained, rows

OLDEST, LATEST = "8.3.252", "8.4.190"
_MARK = "_rep_backbones"  # set on the module that was changed, so that it goes where the changes go
_ROOT = str(Path(__file__).resolve().parents[2])


def install() -> None:
    """Register with Ultralytics; a second call does nothing.

    Raises:
        RuntimeError: the installed Ultralytics is too old, or parses a small model otherwise than expected; it names the
        version and the
            supported window, and nothing stays registered.
    """
    if hasattr(tasks, _MARK):
        return
    if _version(ultralytics.__version__) < _version(OLDEST):
        raise unsupported("it is older than the oldest one that works")
    parse_model = rows.parser(tasks.parse_model)
    self_test(parse_model)
    guess_model_scale = _scale_by_name(tasks.guess_model_scale)
    module: Any
    for module in (tasks, ultralytics_nn):
        module.parse_model = parse_model
        module.guess_model_scale = guess_model_scale
    tasks.check_yaml = _yaml_by_name(tasks.check_yaml)
    for module in (tasks, ultralytics_nn, engine_model):
        module.yaml_model_load = _whole_name_first(module.yaml_model_load)
    dist.generate_ddp_file = _importing_ddp_file(dist.generate_ddp_file)
    fusing.install()
    for module in (tasks, engine_model, engine_trainer):
        module.load_checkpoint = pretrained.knowing_weights(module.load_checkpoint)
    base: Any = engine_trainer.BaseTrainer
    base.setup_model = pretrained.starting_from_yaml(base.setup_model)
    torch.serialization.add_safe_globals([*safe_classes()])
    setattr(tasks, _MARK, True)


def unsupported(why: str) -> RuntimeError:
    return RuntimeError(
        f"rep_backbones cannot be registered with ultralytics {ultralytics.__version__}: {why}. "
        f"Supported versions are {OLDEST} to {LATEST}: pip install 'ultralytics>={OLDEST},<={LATEST}'"
    )


def safe_classes() -> list[type]:
    """The module classes of this package, which a checkpoint may hold under weights-only loading."""
    found = {id(cls): cls for cls in (layer.cls for layer in KNOWN.values()) if _is_ours(cls)}
    found |= {id(cls): cls for cls in (Online, Expanded)}
    for module in (backbones, blocks, containers):
        found |= {id(cls): cls for cls in vars(module).values() if isinstance(cls, type) and _is_ours(cls)}
    return list(found.values())


def self_test(parse_model: rows.Parser) -> None:
    """Parse a small YAML and compare what came out with what it must be; RuntimeError that names the supported versions
    otherwise.
    """
    config = {
        "nc": 3,
        "scales": {"n": [0.5, 0.5, 64]},
        "scale": "n",
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 4, "RepConv", [32, 3, 2]]],
        "head": [[-1, 1, "Conv", [128, 3, 2]], [[1, 2], 1, "Detect", ["nc"]]],
    }
    legacy = vars(Detect).get("legacy")
    try:
        with torch.random.fork_rng(devices=[]):  # importing a package must not move the caller's random numbers
            parsed, save = parse_model(config, ch=3, verbose=False)
        layers: list[Any] = list(parsed)
        stage, conv, head = layers[1], layers[2].conv, layers[3]
        places = [(layer.i, layer.f) for layer in layers]
        seen = (len(stage), conv.in_channels, conv.out_channels, places, save, head.legacy)
    except Exception as error:
        raise unsupported(f"its model parser failed on a small model ({type(error).__name__}: {error})") from error
    finally:
        if legacy is not None:
            Detect.legacy = legacy
    expected = (2, 16, 32, [(0, -1), (1, -1), (2, -1), (3, [1, 2])], [1, 2], False)
    if seen != expected:
        raise unsupported(f"its model parser made {seen} of a small model where {expected} was expected")


# ---- the wrappers ------------------------------------------------------------------------------------------------------


def _scale_by_name(stock: Callable[[Any], str]) -> Callable[[Any], str]:
    @functools.wraps(stock)
    def guess_model_scale(model_path: str | Path) -> str:
        if scale := stock(model_path):
            return scale
        found = names.find(model_path)
        return found.scale if found else ""

    return guess_model_scale


def _whole_name_first(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Ultralytics 8.3 takes yolov7x.yaml for yolov7.yaml with the scale x, also where there is a file of that name."""

    @functools.wraps(stock)
    def yaml_model_load(path: str | Path) -> Any:
        found = names.find(path)
        if found is None or found.file.name != Path(path).name:
            return stock(path)
        return {**YAML.load(found.file), "scale": tasks.guess_model_scale(path), "yaml_file": str(path)}

    return yaml_model_load


def _yaml_by_name(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def check_yaml(file: str | Path, *args: Any, **kwargs: Any) -> Any:
        if found := names.find(file):
            return str(found.file)
        try:
            return stock(file, *args, **kwargs)
        except FileNotFoundError as error:
            if "does not exist" in str(error):
                raise FileNotFoundError(names.missing(file)) from error
            raise

    return check_yaml


def _importing_ddp_file(stock: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(stock)
    def generate_ddp_file(trainer: Any) -> str:
        from rep_backbones.yolo.expand_key import named_in_args  # which needs what is being installed here

        imports = _worker_imports()
        with named_in_args(trainer):
            file = stock(trainer)
        text = Path(file).read_text(encoding="utf-8")
        start = re.search(r'^if __name__ == "__main__":\n', text, re.MULTILINE)
        if start is None:
            raise unsupported("the file that it writes for the workers of a training on several GPUs has an unknown form")
        Path(file).write_text(text[: start.end()] + imports + text[start.end() :], encoding="utf-8")
        return file

    return generate_ddp_file


def _worker_imports() -> str:
    """Lines that make this package and the user's own layers known in a worker, which starts from an empty interpreter."""
    modules = sorted({layer.cls.__module__ for layer in KNOWN.values() if not _is_ours(layer.cls)})
    if "__main__" in modules:
        mine = [layer.name for layer in KNOWN.values() if layer.cls.__module__ == "__main__"]
        raise ValueError(
            f"training on several GPUs cannot import {', '.join(mine)}, registered in the script that was started; "
            "move the class, with its rep_backbones.register_layer, into a module of its own and import that"
        )
    path = [*sys.path, _ROOT]
    lines = ["import sys", f"sys.path.extend(p for p in {path!r} if p not in sys.path)"]
    return "".join(f"    {line}\n" for line in [*lines, *(f"import {name}" for name in ["rep_backbones", *modules])])


def _is_ours(cls: type) -> bool:
    return issubclass(cls, nn.Module) and cls.__module__.split(".")[0] == "rep_backbones"


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))

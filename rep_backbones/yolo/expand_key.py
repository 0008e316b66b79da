"""`rep-yolo train model=yolo11n.pt expand=DiverseBranchBlock`: the key becomes a model YAML, which a training can be
resumed and shared between GPUs with.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import USER_CONFIG_DIR, YAML

from rep_backbones.export.files import replacing
from rep_backbones.registry import layer_named
from rep_backbones.yolo import checkpoint, expanding
from rep_backbones.yolo.door import local

_FAMILIES = ("rtdetr", "yoloe", "yolo-world")  # words in a name that Ultralytics chooses a class of models by
_LETTERS = str.maketrans("0123456789", "ghijklmopq")


def with_yaml(args: Sequence[str], trust: bool) -> list[str]:
    """The arguments of `rep-yolo` with `expand=` replaced by a model YAML that says the same, and the weights to start from.

    Raises:
        ValueError: another mode than train, no model, a resumed training, or an unknown block.
    """
    given = dict(arg.partition("=")[::2] for arg in args)
    if expanding.KEY not in given:
        return list(args)
    rest = [arg for arg in args if arg.partition("=")[0] not in (expanding.KEY, "model")]
    value, model = _read(given[expanding.KEY]), given.get("model", "")
    if not value:
        raise ValueError(f"expand={given[expanding.KEY]} names no block; leave the key out, or give one such as RepVGGBlock")
    if "train" not in args and given.get("mode") != "train":
        raise ValueError("expand= is for `rep-yolo train`; a trained model keeps its branches until it is fused")
    if given.get("resume", "False").lower() not in ("", "false", "0", "no"):
        raise ValueError("expand= and resume= exclude each other: a resumed training has the expansion of its checkpoint")
    if not model:
        raise ValueError("expand= needs the model that is expanded: model=yolo11n.pt or model=yolo11n.yaml")
    if Path(model).suffix.lower() == ".pt":
        weights = local(model)
        config = dict(checkpoint.load(weights, trust=trust).yaml)
        rest = [*rest, *([] if "pretrained" in given else [f"pretrained={weights}"])]
    else:
        config = dict(yaml_model_load(model))
    requests = [*expanding.requests(config), *expanding.requests({expanding.KEY: value})]
    for request in requests:
        layer_named(request["block"])
    config[expanding.KEY] = requests
    return [*rest, f"model={_written(config, Path(model).stem.lower())}"]


@contextmanager
def named_in_args(trainer: Any) -> Iterator[None]:
    """Within the block, the model that a trainer's arguments name is expanded as the one that it holds.

    Up to 8.4.100, the workers of a training on several GPUs build theirs from the arguments alone.
    """
    args, config = trainer.args, getattr(trainer.model, "yaml", None)
    named = str(getattr(args, "model", ""))
    if not isinstance(config, dict) or not expanding.requests(config) or expanding.KEY in _named_yaml(named):
        yield
        return
    kept = dict(vars(args))
    if Path(named).suffix.lower() == ".pt" and kept.get("pretrained", True) is True:
        args.pretrained = named  # the weights, all of which fit the expanded model
    args.model = str(_written(config, Path(named).stem.lower()))
    try:
        yield
    finally:
        vars(args).update(kept)


def _named_yaml(model: str) -> dict[str, Any]:
    return yaml_model_load(model) if Path(model).suffix.lower() in (".yaml", ".yml") else {}


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _written(config: dict[str, Any], stem: str) -> Path:
    """A file whose name asks for no scale, which Ultralytics reads from digits before certain letters, and for the same
    family of models as `stem` does.
    """
    family = "".join(f"{word}-" for word in _FAMILIES if word in stem)
    config = {key: value for key, value in config.items() if key not in ("yaml_file", "ch")}
    scale, scales = config.get("scale"), config.get("scales")
    if scales and scale in scales:
        config["scales"] = {scale: scales[scale]}
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:8].translate(_LETTERS)
    folder = Path(USER_CONFIG_DIR) / "expanded"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{family}expanded-{digest}.yaml"
    with replacing(file) as temporary:  # each process of a training on several GPUs writes it, and reads it at once
        YAML.save(temporary, config)
    return file

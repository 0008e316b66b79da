"""Builds a model from its description: the architecture from the validated YAML, the weights strictly from the file.

The YAML is parsed on torch's meta device, so no number in it can claim memory. Then the described tree is laid beside the
parsed one. Where both agree, the parsed layer stays and takes the file's attributes, which may only be plain data and
tensors. Where they differ, fusing must have been the cause (there are fewer batch norms, or no weights at all), and the
layer is made from its description: an empty object of an allowed class that gets the same plain attributes. The only
constructors that run are those of the validated YAML's layers; no `__setstate__` or `__reduce__` does. Finally the weights
are loaded with `load_state_dict(strict=True)`.
"""

from __future__ import annotations

import copy
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics import __version__ as ultralytics_version
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv, Detect

from rep_backbones.registry import KNOWN
from rep_backbones.yolo.allowed import MODEL_PACKAGES, layer_packages, module_class, within
from rep_backbones.yolo.plain_data import MAX_DEPTH, MAX_VALUES, BoundMethod, Refused, Stored, StoredTensor, describe, plain
from rep_backbones.yolo.safe_yaml import validated
from rep_backbones.yolo.unpickle import Archive

MODELS = {  # class of ultralytics.nn.tasks -> its task
    "DetectionModel": "detect",
    "SegmentationModel": "segment",
    "PoseModel": "pose",
    "OBBModel": "obb",
    "ClassificationModel": "classify",
}
CLASS_BRANCHES = ("cv3", "one2one_cv3")  # of a Detect head
TEXT_MODELS = ("WorldModel", "YOLOEModel", "YOLOESegModel")
Parser = Callable[[dict[str, Any], int, bool], tuple[nn.Sequential, list[int]]]
MAX_LAYERS = 100_000  # yolov9e has 1,260 modules
MODEL_ONLY = ("criterion", "transforms")  # of a model: the loss and the pictures' transforms, neither needed nor built
BOOKKEEPING = frozenset(nn.Module().__dict__)  # what every nn.Module has: weights, children, hooks
TREE = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass(frozen=True, slots=True)
class Parts:
    """The description of one module, checked: its class, and children, weights and buffers by name."""

    cls: type[nn.Module]
    children: dict[str, Stored | None]
    parameters: dict[str, StoredTensor | None]
    buffers: dict[str, StoredTensor | None]
    not_saved: frozenset[str]  # buffers that state_dict() leaves out

    def is_bare(self) -> bool:
        """Whether it has neither layers nor numbers within, as an activation."""
        parts: tuple[dict[str, Any], ...] = (self.children, self.parameters, self.buffers)
        return not any(value is not None for part in parts for value in part.values())


def model_name(root: Any) -> str:
    """The class of the model that `root` describes, one of MODELS. Raises Refused with the reason for any other."""
    if not isinstance(root, Stored) or module_class(root.cls) is None:
        raise Refused(f"it holds no model, but {describe(root)}", "give a checkpoint, such as best.pt")
    if root.cls.name in TEXT_MODELS:
        reason = "its classes come from a text encoder, which is not rebuilt from a YAML"
    elif within(root.cls.module, MODEL_PACKAGES) and root.cls.name in MODELS:
        return root.cls.name
    else:
        reason = f"models that can be rebuilt are {', '.join(MODELS)}"
    raise Refused(f"its model is a {root.cls}: {reason}")


def stored_yaml(root: Stored) -> dict[str, Any]:
    """The YAML that a described model carries, validated."""
    if "yaml" not in root.attributes():
        raise Refused("its model has no YAML to rebuild it from")
    return validated(root.attributes()["yaml"])


def rebuild(root: Stored, archive: Archive) -> tuple[nn.Module, torch.dtype]:
    """The model that `root` describes: float32, on the CPU, in eval mode, `requires_grad` and attributes as in the file.

    The second value is the type in which the file stores most of its weights.

    Raises Refused if its YAML is not valid, if YAML and file disagree, or if an attribute is not plain data.
    """
    model_name(root)
    config = stored_yaml(root)
    builder = Builder(archive)
    parts = builder.parts(root, "the model")
    described = parts.children.get("model")
    if described is None or set(parts.children) - {"model", *MODEL_ONLY}:
        held = ", ".join(parts.children) or "nothing"
        raise Refused(f"its model holds {held}, where `model`, a row of layers, is accepted")
    layers, save = parse(config)
    _check_rows(layers, builder.parts(described, "model"))

    model = builder.empty(parts.cls)
    builder.set_attributes(model, root, "the model", skip=MODEL_ONLY)
    model.__dict__.update(yaml=config, save=save)
    model._modules["model"] = builder.graft(layers, described, "model")
    return model.eval(), builder.load(model, described)


def parse(config: dict[str, Any]) -> tuple[nn.Sequential, list[int]]:
    """Ultralytics' (and our) parser on a validated YAML: layers without memory, and the rows whose output is kept."""
    parser = cast(Parser, tasks.parse_model)
    channels = config.get("channels") or config.get("ch") or 3
    activation = Conv.default_act  # up to 8.4.150 the parser leaves the YAML's activation behind for later models
    try:
        try:
            with torch.device("meta"):
                return parser(copy.deepcopy(config), channels, False)
        except Exception as error:  # a layer's constructor may raise anything, and ours are named in a ValueError
            own = any(row[2] in KNOWN for row in config["backbone"] + config["head"])
            if not own or "meta tensor" not in str(error):  # a layer of the user's may need numbers while it is built
                raise
            return parser(copy.deepcopy(config), channels, False)
    except Exception as error:
        reason = f"Ultralytics {ultralytics_version} cannot build its YAML ({type(error).__name__}: {error})"
        raise Refused(reason) from error
    finally:
        Conv.default_act = activation


def _check_rows(layers: nn.Sequential, described: Parts) -> None:
    if described.cls is not nn.Sequential or list(described.children) != list(layers._modules):
        held = f"{len(described.children)} layers in a {described.cls.__name__}"
        raise Refused(f"its YAML has {len(layers)} rows, and its model {held}: they are not of one model")
    for name, layer in layers.named_children():
        stored = described.children[name]
        source = stored.attributes().get("f") if stored is not None else None
        if source != layer.f:
            raise Refused(f"row {name} takes its input from {layer.f} in its YAML and from {source} in its model")


class Builder:
    """Lays a described tree beside a parsed one. What it made it remembers: a layer that is shared stays shared."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.made: dict[int, nn.Module] = {}
        self.open: set[int] = set()  # descriptions that are being built: meeting one again is a cycle
        self.visits = 0
        self.values = iter(range(MAX_VALUES))  # that attributes may hold in all

    def parts(self, stored: Stored, path: str) -> Parts:
        """`stored` taken apart. Raises Refused if it does not describe a module of an allowed class."""
        self.visits += 1
        if self.visits > MAX_LAYERS or path.count(".") > MAX_DEPTH:
            raise Refused(f"its model has more than {MAX_LAYERS:,} layers, or layers nested more than {MAX_DEPTH} deep")
        cls = module_class(stored.cls)
        if cls is None or not (within(stored.cls.module, layer_packages()) or stored.cls.name in MODELS):
            raise Refused(f"{path} is {describe(stored)}, which is not a layer that can be rebuilt")
        attributes = stored.attributes()
        not_saved = attributes.get("_non_persistent_buffers_set", set())
        return Parts(
            cls,
            _named(attributes, "_modules", Stored, path),
            _named(attributes, "_parameters", StoredTensor, path),
            _named(attributes, "_buffers", StoredTensor, path),
            frozenset(not_saved if isinstance(not_saved, (set, frozenset)) else ()),
        )

    def empty(self, cls: type[nn.Module]) -> nn.Module:
        """A module of `cls` without attributes: its own constructor does not run."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        return module

    def graft(self, built: nn.Module, stored: Stored, path: str) -> nn.Module:
        """The layer for `path`: `built` with the file's attributes if the file has the same layer, else the file's layer."""
        parts = self.parts(stored, path)
        names = {name for name, child in parts.children.items() if child is not None}
        alike = type(built) is parts.cls and names == {name for name, _ in _children(built)}
        if alike and not parts.is_bare():  # a bare layer may be shared by all models of the process (Conv.default_act)
            for name, child in _children(built):
                inner, where = cast(Stored, parts.children[name]), f"{path}.{name}"
                kept = isinstance(built, Detect) and name in CLASS_BRANCHES and self.other_width(child, inner, where)
                built._modules[name] = self.construct(inner, where) if kept else self.graft(child, inner, where)
            built._modules = {name: built._modules.get(name) for name in parts.children}
            self.set_attributes(built, stored, path)
            self.set_unsaved(built, parts, path)
            return built
        bare = parts.is_bare() and not any(True for _ in built.parameters()) and not any(True for _ in built.buffers())
        if not bare and self.norms(stored, path) >= sum(isinstance(module, _BatchNorm) for module in built.modules()):
            reason = f"{path} is a {stored.cls} in its model, and a {type(built).__name__} in its YAML as it is built here"
            raise Refused(f"{reason}, for which fusing is not the cause")
        return self.construct(stored, path)

    def other_width(self, built: nn.Module, stored: Stored, path: str) -> bool:
        """Whether a head's class branch differs from its YAML's in hidden channels only.

        Ultralytics keeps the width of pretrained weights there, whatever number of classes the YAML has afterwards.
        """
        sizes = {key: tensor.size for key, tensor in self.state(stored, path)}
        expected = {f"{path}.{key}": tuple(value.shape) for key, value in built.state_dict().items()}
        if sizes.keys() != expected.keys() or sizes == expected:
            return False
        levels = [[f"{path}.{level}.{key}" for key in branch.state_dict()] for level, branch in built.named_children()]
        return all(sizes[k[0]][1:] == expected[k[0]][1:] and sizes[k[-1]] == expected[k[-1]] for k in levels)

    def construct(self, stored: Stored, path: str) -> nn.Module:
        """The layer that `stored` describes, with its children, its weights still empty."""
        if id(stored) in self.made:
            return self.made[id(stored)]
        if id(stored) in self.open:
            raise Refused(f"{path} holds itself")
        self.open.add(id(stored))
        parts = self.parts(stored, path)
        module = self.empty(parts.cls)
        for name, tensor in parts.parameters.items():
            module._parameters[name] = None if tensor is None else nn.Parameter(_shape_of(tensor), requires_grad=False)
        for name, tensor in parts.buffers.items():
            module._buffers[name] = None if tensor is None else _shape_of(tensor)
        for name, child in parts.children.items():
            module._modules[name] = None if child is None else self.construct(child, f"{path}.{name}")
        module._non_persistent_buffers_set = set(parts.not_saved & set(parts.buffers))
        self.set_attributes(module, stored, path)
        self.set_unsaved(module, parts, path)
        self.open.remove(id(stored))
        self.made[id(stored)] = module
        return module

    def norms(self, stored: Stored, path: str) -> int:
        """How many batch norms the described layer holds."""
        if id(stored) in self.open:
            raise Refused(f"{path} holds itself")
        self.open.add(id(stored))
        parts = self.parts(stored, path)
        inner = sum(self.norms(child, f"{path}.{name}") for name, child in parts.children.items() if child is not None)
        self.open.remove(id(stored))
        return inner + issubclass(parts.cls, _BatchNorm)

    def set_attributes(self, module: nn.Module, stored: Stored, path: str, skip: tuple[str, ...] = ()) -> None:
        """The file's attributes onto `module`: plain data, tensors, and the `forward` of a layer that Ultralytics fused."""
        for name, value in stored.attributes().items():
            where = f"{path}.{name}"
            if name in BOOKKEEPING:
                if name not in TREE and value:
                    raise Refused(f"{where} is not empty: hooks are code")
            elif name in skip:
                continue
            elif not name.isidentifier() or name.startswith("__"):
                raise Refused(f"{where[:200]} is not the name of an attribute")
            elif isinstance(value, StoredTensor):
                module.__dict__[name] = self.archive.tensor(value)
            elif isinstance(value, BoundMethod):
                if name != "forward" or value.owner is not stored or not hasattr(type(module), value.name):
                    accepted = "accepted is a layer's own `forward_fuse` in place of `forward`"
                    raise Refused(f"{where} is {describe(value)}; {accepted}")
                module.__dict__[name] = types.MethodType(getattr(type(module), value.name), module)
            else:
                module.__dict__[name] = plain(value, where, self.values)

    def set_unsaved(self, module: nn.Module, parts: Parts, path: str) -> None:
        """Buffers that state_dict() leaves out, straight from the file."""
        for name in parts.not_saved & set(parts.buffers) & set(module._buffers):
            tensor, made = parts.buffers[name], module._buffers[name]
            if tensor is not None and made is not None and tensor.size != tuple(made.shape):
                raise Refused(f"{path}.{name} has shape {tensor.size}; its YAML gives {tuple(made.shape)}")
            module._buffers[name] = None if tensor is None else self.archive.tensor(tensor)

    def state(self, stored: Stored, path: str) -> Iterator[tuple[str, StoredTensor]]:
        """What state_dict() of the described module has, with `path` in front of the names."""
        parts = self.parts(stored, path)
        for name, tensor in parts.parameters.items():
            if tensor is not None:
                yield f"{path}.{name}", tensor
        for name, tensor in parts.buffers.items():
            if tensor is not None and name not in parts.not_saved:
                yield f"{path}.{name}", tensor
        for name, child in parts.children.items():
            if child is not None:
                yield from self.state(child, f"{path}.{name}")

    def load(self, model: nn.Module, described: Stored) -> torch.dtype:
        """The described weights into `model`, strictly; gives their type. Raises Refused with the first keys that differ."""
        stored, expected = dict(self.state(described, "model")), model.state_dict()
        missing, unexpected = [key for key in expected if key not in stored], [key for key in stored if key not in expected]
        shapes = [key for key in expected if key in stored and stored[key].size != tuple(expected[key].shape)]
        differences = [f"missing {missing[0]} (of {len(missing)})"] if missing else []
        differences += [f"unexpected {unexpected[0]} (of {len(unexpected)})"] if unexpected else []
        if shapes:
            by_yaml = tuple(expected[shapes[0]].shape)
            differences.append(f"shape {stored[shapes[0]].size} for {by_yaml} at {shapes[0]} (of {len(shapes)})")
        if differences:
            reason = f"its weights do not fit its YAML as Ultralytics {ultralytics_version} builds it"
            raise Refused(f"{reason}: {', '.join(differences)}")
        model.load_state_dict({key: self.archive.tensor(tensor) for key, tensor in stored.items()}, strict=True, assign=True)
        for key, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(stored[key].requires_grad and parameter.is_floating_point())
        for path, module in model.named_modules():
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if isinstance(value, torch.Tensor) and value.is_meta:
                    raise Refused(f"its model lacks {path}.{name}, which Ultralytics {ultralytics_version} needs")
        sizes = Counter[torch.dtype]()
        for tensor in stored.values():
            sizes[tensor.dtype] += math.prod(tensor.size) if tensor.dtype.is_floating_point else 0
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def _named(attributes: dict[str, Any], kind: str, wanted: type, path: str) -> dict[str, Any]:
    """`attributes[kind]`, a dictionary of names to `wanted` or None. Raises Refused if it holds anything else."""
    found = attributes.get(kind, {})
    if not isinstance(found, dict):
        raise Refused(f"{path}.{kind} is {describe(found)}")
    for name, value in found.items():
        if not isinstance(name, str) or not name or "." in name or not isinstance(value, (wanted, type(None))):
            raise Refused(f"{path}.{str(name)[:100]} is {describe(value)}, where a {wanted.__name__} belongs")
    return dict(found)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _shape_of(tensor: StoredTensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    return torch.empty(tensor.size, dtype=dtype, device="meta")

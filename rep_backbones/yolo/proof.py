"""Proofs that a deploy model computes what the trained one does: at the outputs, layer by layer, and as an artefact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rep_backbones.export.report import LayerProof
from rep_backbones.rules import branch_names, multi_branch
from rep_backbones.verify import Difference, Mismatch, Report, tensors, verify
from rep_backbones.yolo.branch_log import shares


class Outputs(nn.Module):
    """A model with its outputs by name, boxes, scores and raw maps apart: each has a range of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return named(self.model(x), self.model)


def named(output: Any, model: Any) -> dict[str, Tensor]:
    """The tensors of an output `model` makes, by name; the predictions `(n, 4 + nc + rest, anchors)` in their parts.

    Final detections `(n, k, 6)` of an end-to-end head are left out: the raw maps decide them, and their order is by
    score, so that two equal models may differ in it.
    """
    found = dict(tensors(output))
    first = next(iter(found))
    if getattr(model, "task", "detect") == "classify":
        return found
    predictions = found.pop(first)
    if getattr(model, "end2end", False):
        return found
    return {**split(predictions, model.model[-1].nc), **found}


def split(predictions: Tensor, nc: int) -> dict[str, Tensor]:
    """Boxes, scores and the rest (mask coefficients, keypoints, angle) of predictions `(n, 4 + nc + rest, anchors)`."""
    parts = {"boxes": predictions[:, :4], "scores": predictions[:, 4 : 4 + nc], "extra": predictions[:, 4 + nc :]}
    return {name: part for name, part in parts.items() if part.shape[1]}


def exported_form(model: nn.Module, end2end: bool | None = None, corners: bool = False) -> nn.Module:
    """A copy of `model` whose head answers as it does in an export: the predictions, without what training needs.

    Args:
        end2end: whether the head decides itself what is a detection; None leaves it as it is.
        corners: boxes as (x1, y1, x2, y2), which NMS in the graph needs, and not as centre and size.
    """
    made: Any = deepcopy(model)
    if end2end is not None and hasattr(made, "end2end"):
        made.end2end = end2end
    for module in made.modules():
        if hasattr(type(module), "export"):
            module.export, module.format, module.xyxy = True, "onnx", corners
    return made


def layer_proofs(model: nn.Module, fused: nn.Module, places: Mapping[str, str], batch: Tensor) -> list[LayerProof]:
    """Each multi-branch layer of `model` against its convolution, on the inputs that the layer meets for `batch`.

    Compared is what stands in front of the activation, behind which a wrong channel may be zero by chance.

    Args:
        fused, places: of `fuse.report`.
    """
    convs = dict(fused.named_modules())
    layers = {path: (layer, part) for path, layer, part in multi_branch(model)}
    inside = set(model.modules())
    parts = shares(model)
    found: dict[str, LayerProof] = {}

    def checked(path: str, merged: nn.Module) -> Callable[..., None]:
        def hook(branches: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            handles.pop(path).remove()  # the comparison runs the layer again
            try:
                report = verify(lambda _: output, merged, [inputs[0]])
                if not report.ok:  # looked at again in float64, for which the layer itself is needed
                    report = verify(branches, merged, [inputs[0]])
            except Mismatch:
                report = Report([Difference("0", float("inf"), 0.0, 0.0)])
            layer, part = layers[path]
            conv: Any = convs[places[path]]
            found[path] = LayerProof(
                path=path,
                type=type(layer).__name__,
                branches=branch_names(part),
                kernel=list(conv.kernel_size),
                stride=list(conv.stride),
                groups=conv.groups,
                error=report.error,
                ok=report.ok,
                shares=parts[path],
            )

        return hook

    handles = {}
    for path, (layer, part) in layers.items():
        if part in inside:
            handles[path] = part.register_forward_hook(checked(path, convs[places[path]]))
        else:  # of a layer of other people, of which `part` is a view
            handles[path] = layer.register_forward_hook(checked(path, convs[path]))
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for handle in handles.values():
            handle.remove()
    return [found[path] for path in layers if path in found]


def conv_calls(model: nn.Module, batch: Tensor) -> int:
    """How many convolutions run for one batch, whatever its height and width."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls

"""The deploy checkpoint: a fused model in stock classes, in the form of an Ultralytics checkpoint.

It needs this package neither to load nor to predict, validate or export, and loads under restricted loading as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import fx, nn

from rep_backbones.export.files import replacing
from rep_backbones.fuse import fuse
from rep_backbones.yolo.stock import merge_stock_norms, to_stock

# what of a training's checkpoint describes the weights; the optimizer, the EMA and the like are of no use without branches
_KEPT = ("date", "version", "license", "docs", "git", "train_args", "train_metrics", "train_results")


def deploy_form(model: nn.Module, fused: nn.Module | None = None) -> nn.Module:
    """A fused copy of `model` in classes of torch and Ultralytics only, float32, on the CPU and in eval mode.

    Args:
        fused: what `fuse` made of the model, if that is known.

    Raises:
        FoldError: a layer cannot be fused exactly, with its path and the reason.
        ValueError: a module of this package has no stock form.
    """
    deployed = to_stock(fuse(model.float().eval()) if fused is None else fused).cpu()
    merge_stock_norms(deployed)
    for name in ("args", "criterion", "pt_path"):  # of the loaded object: Ultralytics sets them anew when it loads
        vars(deployed).pop(name, None)
    return deployed.requires_grad_(False)


def what_it_needs(fused: nn.Module) -> list[str]:
    """What a deploy checkpoint of a fused model needs beyond torch and Ultralytics, in sentences; none for most models."""
    notes = []
    kinds = {f"{type(m).__module__}.{type(m).__qualname__}" for m in fused.modules()}
    own = sorted(kind for kind in kinds if kind.split(".")[0] not in ("torch", "ultralytics", "rep_backbones"))
    if own:
        notes.append(
            f"the fused model holds layers of your own ({', '.join(own[:5])}{' ...' * (len(own) > 5)}): to load "
            "_deploy.pt their code must be importable (--import my_layers.py); the other formats do not need it"
        )
    traced = [path for path, module in fused.named_modules() if isinstance(module, fx.GraphModule)]
    if traced:
        notes.append(
            f"{', '.join(traced[:5])}{' ...' * (len(traced) > 5)} merged within a forward that torch.fx wrote anew: "
            "_deploy.pt does not load under restricted loading (ULTRALYTICS_SAFE_LOAD=1)"
        )
    return notes


def save_deploy(
    model: nn.Module, target: Path, *, checkpoint: Mapping[str, Any] | None = None, fused: nn.Module | None = None
) -> nn.Module:
    """Fuse `model` and write it to `target` as an Ultralytics checkpoint in float32; returns what was written.

    Args:
        model: an Ultralytics model with multi-branch layers; not changed but for its dtype (float32) and mode (eval).
        target: the file, replaced only once the new one is complete.
        checkpoint: the training's checkpoint, whose date, arguments and metrics are kept.
        fused: as `deploy_form`.

    Raises:
        FoldError, ValueError: as `deploy_form`.
        TargetError: `target` cannot be written.
    """
    deployed = deploy_form(model, fused)
    about = {key: checkpoint[key] for key in _KEPT if checkpoint and key in checkpoint}
    content = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "version": ultralytics.__version__,
        "train_args": {"task": getattr(model, "task", "detect")},
        **about,
        "epoch": -1,
        "model": deployed,
        "ema": None,
        "optimizer": None,
    }
    with replacing(target) as temporary:
        torch.save(content, temporary)
    return deployed

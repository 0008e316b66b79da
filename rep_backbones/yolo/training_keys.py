"""The keys of a training that Ultralytics does not have: in recipes, on the command line of `rep-yolo`, and in Python as
arguments of `YOLO(...).train(trainer=RepTrainer, ...)`.

| key        | default | meaning                                                                                      |
|------------|---------|----------------------------------------------------------------------------------------------|
| `branches` | `model` | `online`: layers with branches are folded in each step and run as one (see `training_form`)  |
| `scales`   | None    | for `optimizer=RepSGD`, `RepAdamW`: a run of `branches=online` whose scales are the constants |
| `decay`    | `plain` | `equivalent`: kernels of multi-branch layers decay as the one that is deployed (see `decay`)  |
| `wdf`      | 1.0     | the weight decay ends at `weight_decay * wdf`, along half a cosine, as MobileOne's            |

They are kept in the training's arguments only where they differ from the default, so that a checkpoint of a run without them
can be resumed by Ultralytics alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

DECAYS = ("plain", "equivalent")
BRANCHES = ("model", "online", "gradient")
DEFAULTS: dict[str, Any] = {"branches": "model", "scales": None, "decay": "plain", "wdf": 1.0}


def split(arguments: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a trainer without our keys, and ours with their values.

    Raises:
        ValueError: a value that is not accepted.
    """
    given = dict(arguments or {})
    ours = {key: given.pop(key) for key in DEFAULTS if key in given}
    check(ours)
    return given, ours


def check(keys: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not accepted, with those that are."""
    if (decay := keys.get("decay", "plain")) not in DECAYS:
        raise ValueError(f"decay={decay!r} is unknown; accepted are {' and '.join(DECAYS)}")
    if (branches := keys.get("branches", "model")) not in BRANCHES:
        raise ValueError(
            f"branches={branches!r} is unknown; accepted are online, gradient (which optimizer=RepSGD and RepAdamW ask for "
            "themselves), and model, as the model's YAML says"
        )
    if (scales := keys.get("scales")) is not None and not isinstance(scales, (str, os.PathLike)):
        raise ValueError(f"scales={scales!r} is not accepted; give a checkpoint, such as runs/detect/search/weights/best.pt")
    wdf = keys.get("wdf", 1.0)
    if isinstance(wdf, bool) or not isinstance(wdf, (int, float)) or not 0 <= wdf <= 1:
        raise ValueError(
            f"wdf={wdf!r} is not accepted; give the fraction of weight_decay that is left at the end, from 0 to 1"
        )


def of(args: Any) -> dict[str, Any]:
    """Our keys in the arguments of a training, with the defaults where they are not set."""
    return {key: getattr(args, key, default) for key, default in DEFAULTS.items()}


def changed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those that differ from their defaults."""
    return {key: value for key, value in keys.items() if value != DEFAULTS[key]}


@contextmanager
def hidden(args: Any) -> Iterator[None]:
    """Within the block the arguments are Ultralytics' alone: a copy of them may be checked for unknown keys."""
    kept = {key: vars(args).pop(key) for key in DEFAULTS if key in vars(args)}
    try:
        yield
    finally:
        vars(args).update(kept)


def anneal(optimizer: Optimizer, wdf: float, epoch: int, epochs: int) -> None:
    """Set the weight decay of `epoch` (from 0): each group's own at the start, times a cosine from 1 to `wdf`.

    MobileOne (Vasu et al., CVPR 2023, section 3.4) anneals it from 1e-4 to 1e-5.
    """
    along = min(epoch / max(epochs - 1, 1), 1.0)
    factor = wdf + (1 - wdf) * (1 + math.cos(math.pi * along)) / 2
    for group in optimizer.param_groups:
        if epoch == 0:  # at a later one the optimizer may come from a checkpoint, which has kept it
            group["first_weight_decay"] = group["weight_decay"]
        group["weight_decay"] = group["first_weight_decay"] * factor

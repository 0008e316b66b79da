"""The device that is asked for, and whether this machine has it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rep_backbones.yolo.fuse_export import Settings

_CUDA = re.compile(r"(?:cuda:?)?(\d+)|cuda")


def here(settings: Settings) -> tuple[Settings, str]:
    """The settings with a device that this machine has, and what is lacking: "" where it has the one asked for.

    Raises:
        ValueError: a device that is neither the CPU nor a CUDA device.
    """
    given = settings.device
    if given is None or given == "cpu":
        return settings, ""
    found = _CUDA.fullmatch(given.strip().lower())
    if found is None:
        raise ValueError(f"--device {given} is not known; accepted are cpu, and the number of a CUDA device, such as 0")
    index, count = int(found[1] or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index < count:
        return replace(settings, device=str(index)), ""
    there = f"there are {count}, counted from 0" if count else "PyTorch finds no CUDA device here"
    return replace(settings, device=None), f"--device {given}: {there}; all that a CPU can make is made on the CPU"

"""The device that is asked for, and whether this machine has it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path
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
    device, lacking = found(settings.device)
    return replace(settings, device=device), lacking and f"{lacking}; all that a CPU can make is made on the CPU"


def found(given: str | None) -> tuple[str | None, str]:
    """The device as Ultralytics calls it, None where it is left open or not here, and what is lacking then, or "".

    Raises:
        ValueError: as `here`.
    """
    if given is None or given == "cpu":
        return given, ""
    named = _CUDA.fullmatch(given.strip().lower())
    if named is None:
        raise ValueError(f"--device {given} is not known; accepted are cpu, and the number of a CUDA device, such as 0")
    index, count = int(named[1] or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index < count:
        return str(index), ""
    there = f"there are {count}, counted from 0" if count else "PyTorch finds no CUDA device here"
    return None, f"--device {given}: {there}"


def at_hand(given: str | None) -> torch.device:
    """Where a PyTorch model is timed: on the device that is asked for, else on a GPU if there is one."""
    if given is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return torch.device("cpu" if given == "cpu" else f"cuda:{given}")


def described(device: str) -> str:
    """A device with the name of its make, such as "cpu (AMD EPYC, 2 threads)"."""
    if device != "cpu":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({_processor()}, {torch.get_num_threads()} threads)"


def machine(place: torch.device | None = None) -> str:
    """The machine, in words, such as "AMD EPYC, 2 cores"; on a GPU, by default the first one, that one's name."""
    place = at_hand(None) if place is None else place
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()

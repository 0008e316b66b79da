"""Settings of Ultralytics changed for a while, and put back."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ultralytics.utils import LOGGER, checks


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """`holder.name` is `value` within the block."""
    kept = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, kept)


@contextmanager
def no_installs() -> Iterator[None]:
    """Nothing is installed behind the user's back, unless the environment asks for it (YOLO_AUTOINSTALL)."""
    if "YOLO_AUTOINSTALL" in os.environ:
        yield
        return
    with replaced(checks, "AUTOINSTALL", False):
        yield


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Ultralytics says warnings and errors only."""
    level = LOGGER.level
    if wanted:
        LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


@contextmanager
def jit_unwarned() -> Iterator[None]:
    """Without PyTorch's warnings that TorchScript is deprecated: whoever asks for it knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit")
        yield


@contextmanager
def muted(wanted: bool = True) -> Iterator[None]:
    """What programs and compiled libraries print, past Python's own streams, is not seen."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)

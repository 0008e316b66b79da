"""Settings of Ultralytics changed for a while, and put back."""

from __future__ import annotations

import logging
import os
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

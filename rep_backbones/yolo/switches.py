"""Settings of Ultralytics changed for a while, and put back."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
import ultralytics.utils
from ultralytics.utils import LOGGER, downloads, torch_utils

from rep_backbones.yolo.plain_data import Refused

_INSTALLS = re.compile(r"\b(pip3?|uv|pipx|conda|mamba|apt|apt-get|brew|npm)\b.*\b(install|add|update)\b")


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
def replaced_everywhere(stock: Any, name: str, value: Any) -> Iterator[None]:
    """`value` stands for `stock` in each module of Ultralytics that has it as `name`, those first imported meanwhile too."""
    _rebind(name, stock, value)
    try:
        yield
    finally:
        _rebind(name, value, stock)


def _rebind(name: str, old: Any, new: Any) -> None:
    for key, module in list(sys.modules.items()):
        if key.partition(".")[0] == "ultralytics" and vars(module).get(name) is old:
            setattr(module, name, new)


@contextmanager
def no_installs() -> Iterator[None]:
    """Nothing is installed, whatever YOLO_AUTOINSTALL says: what is missing is reported, and the user gets it."""
    before = os.environ.get("YOLO_AUTOINSTALL")
    os.environ["YOLO_AUTOINSTALL"] = "false"  # for processes that are started meanwhile
    try:
        with ExitStack() as stack:
            stack.enter_context(replaced_everywhere(ultralytics.utils.AUTOINSTALL, "AUTOINSTALL", False))
            stack.enter_context(replaced(subprocess.Popen, "__init__", _without_installers(subprocess.Popen.__init__)))
            yield
    finally:
        if before is None:
            del os.environ["YOLO_AUTOINSTALL"]
        else:
            os.environ["YOLO_AUTOINSTALL"] = before


def _without_installers(stock: Callable[..., None]) -> Callable[..., None]:
    """Some parts of Ultralytics call the package manager without asking AUTOINSTALL."""

    def __init__(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        command = args if isinstance(args, (str, bytes)) else " ".join(map(os.fsdecode, args))
        command = os.fsdecode(command)
        if _INSTALLS.search(command):
            self.returncode = self._child_created = None  # what its __del__ asks for
            raise Refused(f"Ultralytics wants to run `{command[:200]}`, and nothing is installed for you", "run it yourself")
        stock(self, args, *rest, **options)

    return __init__


@contextmanager
def no_downloads(named: Sequence[str] = ()) -> Iterator[Callable[[], Any]]:
    """Ultralytics fetches no file over the network but those that the user has `named`, as words of the command line: an
    address, or the name of the file. Gives a context manager within which everything is fetched.
    """
    wanted = [value for word in named if (value := word.partition("=")[2] or word)]
    stock, stock_is_url = downloads.safe_download, downloads.is_url
    free: list[None] = []

    def safe_download(url: Any, *args: Any, **kwargs: Any) -> Any:
        if "://" in str(url) and not free and not _is_named(str(url), wanted):
            raise ConnectionError(
                f"{url} is not downloaded, since the command does not name it; get it yourself and give its path"
            )
        return stock(url, *args, **kwargs)

    def is_url(url: Any, check: bool = False) -> bool:
        return bool(stock_is_url(url)) and (not check or bool(free)) and bool(stock_is_url(url, check))

    @contextmanager
    def freely() -> Iterator[None]:
        free.append(None)
        try:
            yield
        finally:
            free.pop()

    with replaced_everywhere(stock, "safe_download", safe_download), replaced_everywhere(stock_is_url, "is_url", is_url):
        yield freely


def _is_named(url: str, wanted: Sequence[str]) -> bool:
    stem = PurePosixPath(urlsplit(url).path).stem
    return any(value == url or PurePosixPath(value).stem == stem for value in wanted)


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
def untold() -> Iterator[None]:
    """OpenVINO, if it is imported within the block for the first time, does not report its use over the network.

    It does so from its import on, unless its package for that is missing.
    """
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def jit_unwarned() -> Iterator[None]:
    """Without PyTorch's warnings that TorchScript is deprecated: whoever asks for it knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit")
        yield


def threads_kept() -> AbstractContextManager[None]:
    """Choosing the CPU leaves PyTorch its threads: Ultralytics takes one core fewer than there are, from then on."""
    return replaced(torch_utils, "NUM_THREADS", torch.get_num_threads())


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

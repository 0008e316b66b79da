"""Files that appear whole or not at all: a run that is killed leaves the old file or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORK = ".fuse_export-"  # then the process, so that what a killed one left can be told from what one is using


class TargetError(Exception):
    """A place that was to be written to cannot be; the message names it, the reason and what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` if the block ends well; it is removed if not.

    Raises:
        TargetError: the folder cannot be written to, or its disk is full.
    """
    with _telling(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with _telling(path):
            yield temporary
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)  # mkstemp's files are their owner's alone
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(path: Path) -> Path:
    """The folder `path`, made if it is missing and tried with a file, so that the work is not done in vain.

    Raises:
        TargetError: it cannot be made or written to.
    """
    with _telling(path):
        path.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writable-", dir=path)
        os.close(handle)
        os.unlink(name)
    return path


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder inside `target`, on the same disk, that is gone afterwards; and those that killed runs left are too.

    Raises:
        TargetError: it cannot be made.
    """
    for left in target.glob(f"{_WORK}*"):
        if not _runs(left.name.removeprefix(_WORK).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    with _telling(target):
        folder = Path(tempfile.mkdtemp(prefix=f"{_WORK}{os.getpid()}-", dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # it runs, and is another user's
        return True
    return True


def place(moves: Iterable[tuple[Path, Path]]) -> None:
    """Give files and folders their places one right after the other, with interrupts held back meanwhile.

    Each replaces what was there, a folder too. Where a folder stood or comes, what was there ends up beside the new one's
    former place, which is to be cleared away.

    Raises:
        TargetError: a place cannot be written to.
    """
    with _uninterrupted():
        for made, path in moves:
            with _telling(path):
                if os.path.lexists(path) and (made.is_dir() or (path.is_dir() and not path.is_symlink())):
                    _swap(made, path)
                else:
                    os.replace(made, path)


def _swap(made: Path, path: Path) -> None:
    """Exchange the two in one step where the system can, so that a kill leaves one of them whole; in two where not."""
    if not _exchanged(made, path):
        os.rename(path, made.with_name(f"{made.name}.old"))
        os.rename(made, path)


def _exchanged(made: Path, path: Path) -> bool:
    exchange, relative_to_here = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    return rename(relative_to_here, os.fsencode(made), relative_to_here, os.fsencode(path), exchange) == 0


@contextmanager
def _uninterrupted() -> Iterator[None]:
    held = {signal.SIGINT, signal.SIGTERM}
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk stands behind an error, however many libraries have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
            return True  # torch.save reports it so
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TargetError(
            f"cannot write {path}: {reason}. Free the space or give a folder that can be written to"
        ) from error
    except RuntimeError as error:
        if not disk_is_full(error):
            raise
        raise TargetError(f"cannot write {path}: No space left on device. Free the space on its disk") from error

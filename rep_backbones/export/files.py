"""Files that appear whole or not at all: a run that is killed leaves the old file or the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TargetError(
            f"cannot write {path}: {reason}. Free the space or give a folder that can be written to"
        ) from error
    except RuntimeError as error:  # torch.save reports a full disk so
        if "PytorchStreamWriter" not in str(error) and "write" not in str(error):
            raise
        raise TargetError(f"cannot write {path}: {str(error).splitlines()[0]}. Free the space on its disk") from error

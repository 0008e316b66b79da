"""How the command lines of this package end: with one line that says what was wrong, an exit status, and no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from rep_backbones.export.files import TargetError
from rep_backbones.yolo.backends import MissingBackend
from rep_backbones.yolo.pages import ROOT

BAD_INPUT, FAILED, MISSING, INTERRUPTED = 2, 3, 4, 130


def ended(name: str, work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """The exit status of `work`, or of what it raises: bad input, a target that cannot be written, a missing backend.

    Args:
        name: of the command, in front of the message.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return failed(name, interrupted, INTERRUPTED)
    except MissingBackend as error:
        return failed(name, str(error), MISSING)
    except (TargetError, ValueError) as error:
        return failed(name, str(error), BAD_INPUT)
    except Exception as error:  # whatever happened
        if os.environ.get("REP_YOLO_TRACEBACK"):
            traceback.print_exc()
        return failed(name, f"{type(error).__name__}: {error} (REP_YOLO_TRACEBACK=1 shows where)", FAILED)


def of_checkout() -> dict[str, str]:
    """The environment of a Python process that imports this package from where it is now."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


def failed(name: str, message: str, status: int) -> int:
    """Tell the message; returns the status."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    return status

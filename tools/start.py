"""How the tools start: with this checkout, and so that Ctrl-C ends them at any time."""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path


def run(module: str) -> None:
    """Call `main` of a module of this checkout, whatever else is installed, and exit with its status."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    stoppable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stoppable:  # libraries swallow the exception of Ctrl-C while they are loaded, and nothing can be lost yet
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    main = import_module(module).main
    if stoppable:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

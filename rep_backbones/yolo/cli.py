"""`rep-yolo`: the command line of `yolo`, with this package's layers, models and trainers known.

    rep-yolo train model=efficientrep-n.yaml data=coco8.yaml epochs=10
    rep-yolo export model=best_deploy.pt format=onnx

The grammar is that of `yolo`. More keys: `import=my_layers.py` (or `--import my_layers.py`, more than once if need be)
imports code of your own that registers layers; `trust=True` (or `--trust`) reads checkpoints, model YAMLs and data as `yolo`
does, with the code that they hold; `train ... expand=DiverseBranchBlock` trains the model with branches beside its plain
convolutions (or a mapping, `expand="{'block': 'MobileOneBlock', 'n': 2}"`). `cfg=repvgg.yaml` names one of the recipes that
this package carries; `decay=` and `wdf=` are keys of a training (see `training_keys`). Exit status: 0 done, 1 it failed, 2
bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ultralytics.cfg
import ultralytics.engine.model
from ultralytics.engine.model import Model
from ultralytics.utils import YAML

from rep_backbones.yolo import checkpoint, door, expand_key, pretrained, recipes, training_keys, user_code
from rep_backbones.yolo.plain_data import Refused
from rep_backbones.yolo.switches import no_installs, replaced

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_INPUT_ERRORS = (ValueError, TypeError, SyntaxError, KeyError, AssertionError, ImportError, OSError)
_TRUE, _FALSE = ("true", "1", "yes", ""), ("false", "0", "no")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, `argv` without the program's name (the process's own by default); returns the exit status and prints
    one line on failure.
    """
    try:
        args, trust, imports = _without_our_keys(sys.argv[1:] if argv is None else argv)
        for note in user_code.load(imports):
            print(f"rep-yolo: note: {note}", file=sys.stderr)
        run(expand_key.with_yaml(recipes.with_file(args), trust), trust=trust)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _failed(str(stop.code), FAILED) if stop.code else 0
    except Exception as error:  # a command line ends with a message and a status, whatever happened
        if os.environ.get("REP_YOLO_TRACEBACK"):
            traceback.print_exc()
        error = _refusal(error)
        if isinstance(error, _INPUT_ERRORS):
            return _failed(_one_line(error), BAD_INPUT)
        return _failed(f"{_one_line(error)} (REP_YOLO_TRACEBACK=1 shows where)", FAILED)
    return 0


def run(args: Sequence[str], *, trust: bool = False) -> None:
    """The command that `yolo` would run with these arguments, trained by this package's trainers, and with nothing executed
    that it reads (see `door`), unless `trust` is given.

    Raises what Ultralytics raises, and `rep_backbones.yolo.plain_data.Refused` for a file that is damaged or would run code.
    """
    with ExitStack() as stack:
        for module in (
            ultralytics.cfg,
            ultralytics.engine.model,
        ):  # the second saves pictures where the command is a `yolo predict`
            stack.enter_context(replaced(module, "ARGV", ["rep-yolo", *args]))
        known = {
            **ultralytics.cfg.DEFAULT_CFG_DICT,
            **training_keys.DEFAULTS,
        }  # to the command line; the trainer takes them out
        stack.enter_context(replaced(ultralytics.cfg, "DEFAULT_CFG_DICT", known))
        stack.enter_context(replaced(Model, "_smart_load", _with_our_trainers(Model._smart_load)))
        stack.enter_context(no_installs())
        if not trust:
            _check_named_files(args)
            stack.enter_context(door.shut(args))
        ultralytics.cfg.entrypoint()


def _without_our_keys(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The arguments without our own keys, and their values: `trust`, and each `import`."""
    args: list[str] = []
    imports: list[str] = []
    trust = False
    words = iter(ultralytics.cfg.merge_equals_args(list(argv)))
    for arg in words:
        key, _, value = arg.lstrip("-").partition("=")
        if key.strip() == "import":
            value = value.strip() or next(words, "")
            if not value:
                raise ValueError("import takes a file, such as import=my_layers.py, or a module")
            imports.append(value)
        elif key.strip() != "trust":
            args.append(arg)
        elif value.strip().lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"trust takes True or False, got {value!r}")
        else:
            trust = value.strip().lower() in _TRUE
    return args, trust, imports


def _check_named_files(args: Sequence[str]) -> None:
    """Check each checkpoint that the command names, itself or in its `cfg`: some model families read theirs in a way of
    their own.
    """
    given = dict(arg.partition("=")[::2] for arg in args)
    values = list(given.values())
    if "cfg" in given and Path(given["cfg"]).is_file():
        content = YAML.load(given["cfg"])
        values += [str(value) for value in content.values()] if isinstance(content, dict) else []
    for value in values:
        if Path(value).suffix.lower() in (".pt", ".pth") and Path(value).is_file() and not pretrained.holds_weights(value):
            checkpoint.check(value)


def _with_our_trainers(stock: Callable[..., Any]) -> Callable[..., Any]:
    def _smart_load(self: Model, key: str) -> Any:
        loaded = stock(self, key)
        if key != "trainer":
            return loaded
        from rep_backbones.yolo.trainer import TRAINERS

        ours = TRAINERS.get(str(self.task))
        # a trainer that Ultralytics has for a special model (YOLO-World, YOLOE, RT-DETR) is not ours to replace
        return ours if ours is not None and issubclass(ours, loaded) else loaded

    return _smart_load


def _refusal(error: Exception) -> Exception:
    """The refusal behind an error, where there is one: Ultralytics wraps what goes wrong with the data."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Refused):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _failed(message: str, status: int) -> int:
    print(f"rep-yolo: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    """The first paragraph of the message, which in Ultralytics the whole help may follow, on one line and without terminal
    colours.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    first = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
    known = isinstance(error, (ValueError, FileNotFoundError, SyntaxError)) and first
    return first if known else f"{type(error).__name__}: {first}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main())

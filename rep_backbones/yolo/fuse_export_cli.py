"""The command line of `tools/fuse_export.py`.

Exit status: 0 all proved; 2 bad input, or a target that cannot be written; 3 a proof failed or a multi-branch layer is left;
4 a backend that was asked for is missing; 130 interrupted. With --check: 0 all files are whole; 2 no report; 3 one is not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rep_backbones.export.check import NoReport, check
from rep_backbones.yolo import formats, user_code
from rep_backbones.yolo.artifacts import FORMATS
from rep_backbones.yolo.command import ended, failed
from rep_backbones.yolo.fuse_export import BAD_INPUT, MISSING, PROVED, UNPROVED, Settings, run

ENDS = {
    PROVED: "all proved",
    UNPROVED: "NOT PROVED; do not deploy what is named .unproved. The report says where it differs",
    MISSING: "all that can be made here is made and proved",
}
NOT_ALL = "not everything could be made; what is there is proved"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (the process's own by default); returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.check and options.weights:
        parser.error("--check takes a report and no checkpoint; give one of them")
    if options.list_formats:
        print(formats.listing(FORMATS))
        return PROVED
    if options.check:
        return _check(options.check)
    if options.weights is None:
        parser.error("the weights are missing: give a checkpoint, such as best.pt, or --check REPORT, or --list-formats")
    return ended("fuse_export", lambda: _run(options), interrupted="interrupted; nothing that was there before has changed")


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        formats=tuple(options.format),
        imgsz=tuple(options.imgsz) if options.imgsz else None,
        batch=options.batch,
        dynamic=options.dynamic,
        half=options.half,
        nms=options.nms,
        int8=options.int8,
        int8_max_drop=options.int8_max_drop,
        data=options.data,
        device=options.device,
        foreign=options.foreign,
        latency=not options.no_latency,
        imports=tuple(options.imports),
    )


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    with _terminable():
        for note in user_code.load(options.imports):
            _say(f"note: {note}")
        outcome = run(options.weights, settings, out=options.out, trust=options.trust, verbose=options.verbose, tell=_say)
    for note in outcome.report.notes:
        _say(f"note: {note}")
    for failure in outcome.report.failures:
        if outcome.status == UNPROVED:
            print(f"fuse_export: {failure}", file=sys.stderr)
    about = outcome.report.artifacts
    unproved = any(about[name]["proved"] is False for name in outcome.artifacts)
    end = NOT_ALL if outcome.status == UNPROVED and not unproved else ENDS[outcome.status]
    if outcome.status == PROVED and (unrun := [name for name in outcome.artifacts if about[name]["proved"] is None]):
        end = f"all that can be run here is proved; NOT RUN: {', '.join(unrun)}"
    _say(f"{end} (exit status {outcome.status})")
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuse_export.py",
        description="Merge every multi-branch layer of a trained detector into one convolution, prove that it computes the "
        "same, and export it. Writes <stem>_deploy.pt, the artefacts beside it, and <stem>_deploy_report.json.",
        epilog="Exit status: 0 all proved; 2 bad input; 3 a proof failed; 4 a backend is missing; 130 interrupted.",
    )
    parser.add_argument(
        "weights",
        nargs="?",
        help="a checkpoint of Ultralytics, such as runs/detect/train/weights/best.pt; in front of --format",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"proved: {', '.join(FORMATS)}; others as --list-formats tells (default: onnx, and engine where CUDA and "
        "TensorRT are)",
    )
    parser.add_argument(
        "--list-formats", action="store_true", help="tell which formats can be made and proved here, and end"
    )
    parser.add_argument("--imgsz", nargs="+", type=int, help="pixels, or height and width (default: as trained)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--dynamic", action="store_true", help="let batch, height and width vary")
    parser.add_argument("--half", action="store_true", help="FP16")
    parser.add_argument("--nms", action="store_true", help="put non-maximum suppression into the artefact")
    parser.add_argument("--int8", action="store_true", help="also an INT8 file, <stem>_deploy_int8.onnx; needs --data")
    parser.add_argument(
        "--int8-max-drop", type=float, default=1.0, metavar="AP", help="AP in points that INT8 may lose (default: 1.0)"
    )
    parser.add_argument("--data", type=Path, help="data YAML or COCO folder: AP of every form, and pictures for INT8")
    parser.add_argument("--device", help="such as 0 or cpu (default: cpu; an engine is built on 0)")
    parser.add_argument(
        "--foreign",
        choices=["measure", "keep", "refuse"],
        default="measure",
        help="layers without a rule: merge what is measured and proved to be one convolution, keep them, or refuse them "
        "(default: measure)",
    )
    parser.add_argument("--no-latency", action="store_true", help="do not measure how long each form takes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for all files (default: that of the weights)")
    parser.add_argument("--trust", action="store_true", help="unpickle the file with all code that it holds")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="REPORT",
        help="only compare the files beside a _deploy_report.json with the hashes in it",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="code of your own that registers layers, imported before the weights are read; a file or a module, repeatable",
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ultralytics says while it exports")
    return parser


def _check(report: Path) -> int:
    try:
        found = check(report)
    except NoReport as error:
        return failed("fuse_export", str(error), BAD_INPUT)
    for one in found:
        print(f"fuse_export: {one.path}: {one.said}", file=sys.stdout if one.good else sys.stderr, flush=True)
    if not found:
        return failed("fuse_export", f"{report} names no file: that run made none. Export again", UNPROVED)
    bad = sum(not one.good for one in found)
    if bad:
        return failed("fuse_export", f"{bad} of {len(found)} files must not be used (exit status {UNPROVED})", UNPROVED)
    _say(f"all {len(found)} files are those that were reported (exit status {PROVED})")
    return PROVED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what was made so far is cleared away."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def terminated(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(f"fuse_export: {line}", flush=True)

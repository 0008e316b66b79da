"""What branches cost, measured side by side on this machine: in training, in inference, and to fuse.

python tools/benchmark.py train|infer|fuse [--device cpu|0] [--out docs/benchmarks]

    train  a training step of each block, and of whole detectors, against the plain layers of the same deployed form and
           against the blocks of Ultralytics and timm
    infer  detectors and classifiers, multi-branch, fused and plain, in every runtime that is here
    fuse   speed, memory and error of fusing and exporting; without a word, this one
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rep_backbones.export.files import writable_folder
from rep_backbones.yolo.benchmarks import fusing, inference, results, training
from rep_backbones.yolo.benchmarks.results import Findings
from rep_backbones.yolo.command import ended
from rep_backbones.yolo.devices import at_hand, found, machine

# the visible table: a word -> what measures it, given the device, whether it is a first look, a pattern, and runs
Measures = Callable[[torch.device, bool, str, "int | None"], Findings]
WORDS: dict[str, Measures] = {"train": training.measured, "infer": inference.measured, "fuse": fusing.measured}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the page, and write it with its data and picture to `--out` if asked to; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=WORDS, default="fuse", help="what is measured (default: fuse)")
    parser.add_argument("--device", help="cpu, or the number of a CUDA device (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write a page, JSON and a picture")
    parser.add_argument("--quick", action="store_true", help="a first look: tiny sizes, few runs")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="blocks and models whose names match, as 'Rep*'")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of each at most (default: as many as are needed)")
    options = parser.parse_args(argv)
    command = shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    return ended("benchmark", lambda: _run(options, command), interrupted="interrupted; older results are as they were")


def _run(options: argparse.Namespace, command: str) -> int:
    device, lacking = found(options.device)
    if lacking:
        raise ValueError(f"{lacking}; give --device cpu")
    if options.repeats is not None and options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats} is not accepted; give a whole number from 1")
    place = at_hand(device)
    if options.out:
        writable_folder(options.out)
    measured = WORDS[options.what](place, options.quick, options.only, options.repeats)
    if options.out:
        results.write(options.out, options.what, measured, machine(place), command, quick=options.quick)
    print(results.page(measured, machine(place), command, quick=options.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())

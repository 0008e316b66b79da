#!/usr/bin/env python3
"""What branches cost, side by side: `python tools/benchmark.py train|infer|fuse`; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.benchmark")

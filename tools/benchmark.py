#!/usr/bin/env python3
"""Measure speed, memory and error, side by side: `python tools/benchmark.py`; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.benchmark")

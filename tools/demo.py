#!/usr/bin/env python3
"""Train, fuse, export and prove a small detector on drawn shapes: `python tools/demo.py`; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.demo")

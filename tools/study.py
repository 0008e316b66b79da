#!/usr/bin/env python3
"""Trains one detector with each kind of branches and compares them: python tools/study.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.study")

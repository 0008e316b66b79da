#!/usr/bin/env python3
"""Train, fuse, export and prove a small detector on drawn shapes: `python tools/demo.py`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

from rep_backbones.yolo.demo import main

if __name__ == "__main__":
    sys.exit(main())

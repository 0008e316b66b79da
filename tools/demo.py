#!/usr/bin/env python3
"""Train, fuse, export and prove a small detector on drawn shapes: `python tools/demo.py`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

if __name__ == "__main__":
    try:
        from rep_backbones.yolo.demo import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are loaded
        sys.exit(130)

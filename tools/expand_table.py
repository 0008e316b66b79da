"""Measures what expand and fuse do to real networks, into docs/expand.md: python tools/expand_table.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.expand_table")

"""Fuses public models by measurement alone and measures that, into docs/foreign.md: python tools/foreign_table.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.foreign_table")

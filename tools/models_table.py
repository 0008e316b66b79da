"""Counts and times every model YAML of this package, into docs/models.md: python tools/models_table.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.models_table")

#!/usr/bin/env python3
"""Fuse, prove and export a trained model: `python tools/fuse_export.py weights.pt`; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.fuse_export_cli")

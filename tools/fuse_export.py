#!/usr/bin/env python3
"""Fuse, prove and export a trained model: `python tools/fuse_export.py weights.pt`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

from rep_backbones.yolo.fuse_export_cli import main

if __name__ == "__main__":
    sys.exit(main())

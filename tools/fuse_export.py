#!/usr/bin/env python3
"""Fuse, prove and export a trained model: `python tools/fuse_export.py weights.pt`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

if __name__ == "__main__":
    try:
        from rep_backbones.yolo.fuse_export_cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are loaded
        sys.exit(130)

"""Measures what expand and fuse do to real networks, into docs/expand.md: python tools/expand_table.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rep_backbones.yolo.expand_table import main

if __name__ == "__main__":
    sys.exit(main())

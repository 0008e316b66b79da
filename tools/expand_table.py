"""Measures what expand and fuse do to real networks, into docs/expand.md: python tools/expand_table.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    try:
        from rep_backbones.yolo.expand_table import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are loaded
        sys.exit(130)

"""Draws each block and measures what it costs in training, into docs/blocks.md: python tools/block_pages.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    try:
        from rep_backbones.yolo.block_pages import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are loaded
        sys.exit(130)

"""Draws each block and measures what it costs in training, into docs/blocks.md: python tools/block_pages.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rep_backbones.yolo.block_pages import main

if __name__ == "__main__":
    sys.exit(main())

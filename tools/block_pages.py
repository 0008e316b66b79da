"""Draws each block and measures what it costs in training, into docs/blocks.md: python tools/block_pages.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.block_pages")

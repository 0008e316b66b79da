"""Fuses the branches of an ONNX file of which the source is not there: python tools/fuse_onnx.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.fuse_onnx")

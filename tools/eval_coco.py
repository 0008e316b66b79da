#!/usr/bin/env python3
"""AP of any number of artefacts, side by side: `python tools/eval_coco.py best.pt best_deploy.onnx --data data.yaml`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.eval_coco")

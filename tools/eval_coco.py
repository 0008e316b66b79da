#!/usr/bin/env python3
"""AP of any number of artefacts, side by side: `python tools/eval_coco.py best.pt best_deploy.onnx --data data.yaml`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

if __name__ == "__main__":
    try:
        from rep_backbones.yolo.eval_coco import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are loaded
        sys.exit(130)

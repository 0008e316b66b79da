"""Measures what each form of training branches costs, into docs/training.md: python tools/training_forms.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from start import run

    run("rep_backbones.yolo.forms_cost")

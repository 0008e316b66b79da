"""Settings that must stand before Ultralytics is imported: no network, no pip, none of the user's own settings."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS="1", MPLBACKEND="Agg")
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics-")

KNOWN = Path(__file__).with_name("known_failures.txt")


def pytest_collection_modifyitems(items):
    """Tests of known defects are run and expected to fail, by name, so that the list can only shrink in the open."""
    known = set(KNOWN.read_text().split("\n")) if KNOWN.exists() else set()
    for item in items:
        if item.nodeid in known:
            item.add_marker(pytest.mark.xfail(reason="a known defect: tests/known_failures.txt", strict=False))

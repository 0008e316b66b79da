"""Settings that must stand before Ultralytics is imported: no network, no pip, none of the user's own settings."""

import os
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background, and inherited
os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS="1", MPLBACKEND="Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core, and threads beyond that wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics-")

"""Settings that must stand before Ultralytics is imported: no network, no pip, none of the user's own settings."""

import os
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background, and inherited
os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS="1", MPLBACKEND="Agg")
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics-")

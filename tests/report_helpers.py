"""Reports and checkpoints that the tests of the report share."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

HASH = "0" * 64
SCHEMA = Path(__file__).parent.parent / "rep_backbones" / "export" / "report.schema.json"
EVIL = "<script>document.title='ran'</script>"


def invalid(report: dict[str, Any]) -> list[str]:
    """What the schema says against a report."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(report)]


def latency(ms: float) -> dict[str, Any]:
    one = {"median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.4 * ms, "runs": 10}
    return {"device": "cpu", "batches": {"1": one, "8": {**one, "median_ms": 1.1 * ms}}}


def ap(value: float) -> dict[str, Any]:
    return {"ap": value, "ap50": value, "ap75": value, "small": None, "medium": value, "large": value}


def layer(index: int, **changes: Any) -> dict[str, Any]:
    shape = {"kernel": [3, 3], "stride": [2, 2], "groups": 1}
    shares = {"kxk": 0.5, "1x1": 0.3, "identity": 0.2}
    about = {"path": f"model.{index}.cv1", "type": "RepVGGBlock", "branches": list(shares), "error": 3e-7, "ok": True}
    return {**about, **shape, "shares": shares, **changes}


def full(layers: int = 5) -> dict[str, Any]:
    """A report that holds everything that a report may hold, and names that a page must escape."""
    output = {"name": "boxes", "error": 2e-7, "range": 548.5, "tolerance": 1e-5, "ok": True}
    file = {"sha256": HASH, "bytes": 18_086_927, "proved": True}
    counts = {"multi_branch_layers": layers, "convs": 114, "parameters": 4_896_569, "gflops": 3.24}
    int8 = {
        "calibration": {"pictures": 292, "method": "percentile"},
        "tried": [{"name": "bias correction", "sqnr_db": 21.3, "ap": 0.5921, "chosen": True}],
        "kept_in_float": ["model.32.dfl.conv"],
        "sensitivity": [{"layer": "model.5.cv1", "sqnr_db": 8.25}, {"layer": "model.6.cv1", "sqnr_db": None}],
    }
    bad = layer(layers, path=f"model.{EVIL}层$\\frac$", type=EVIL, error=None, ok=False)  # a formula, were it TeX
    found = {"path": "model.3.m", "type": EVIL, "convs_before": 2, "convs_after": 1}
    report: dict[str, Any] = {
        "schema": "rep_backbones/fuse_export/1",
        "created": "2026-01-02T03:04:05+0000",
        "versions": {"python": "3.11.7", "rep_backbones": "0.1.0", "torch": "2.15.0", "ultralytics": "8.4.190"},
        "source": {
            "path": "my best.pt",
            "sha256": HASH,
            "task": "detect",
            "stored_as": "float16",
            "fp32_weights_used": True,
            "epoch": -1,
            "date": None,
            "ultralytics": None,
            "trusted": True,
        },
        "settings": {
            "formats": ["onnx", "engine"],
            "imgsz": [480, 640],
            "batch": 8,
            "dynamic": True,
            "half": False,
            "nms": False,
            "device": None,
            "pictures": ["bus.jpg"],
        },
        "status": 3,
        "counts": {"before": counts, "after": {**counts, "multi_branch_layers": 0, "convs": 79}},
        "layers": [*(layer(index) for index in range(layers)), bad],
        "foreign": [
            {**found, "outcome": "merged", "reason": "", "error": 2e-14, "gained": "4 steps -> 1, 10% fewer FLOPs"},
            {**found, "outcome": "left", "reason": f"{EVIL} is not affine", "error": None, "gained": ""},
        ],
        "proofs": {"fuse": {"ok": True, "error": 2e-7, "outputs": [output]}},
        "artifacts": {
            "pt": {**file, "path": "my best_deploy.pt", "latency": latency(22), "ap": ap(0.5989)},
            "onnx": {**file, "path": "my best_deploy.onnx", "ok": True, "error": 2e-7, "outputs": [output]},
            "onnx_int8": {**file, "path": "my best_deploy_int8.onnx", "latency": latency(9), "ap": ap(0.5921), "int8": int8},
            "ncnn": {**file, "path": "my best_deploy_ncnn_model", "proved": None},
            "engine": {"missing": "no CUDA device", "trtexec": "trtexec --onnx='my best_deploy.onnx'"},
        },
        "trained": {"latency": latency(31), "ap": ap(0.5989)},
        "notes": [EVIL],
        "failures": [f"layer {EVIL} is off\n  by much"],
    }
    return copy.deepcopy(report)

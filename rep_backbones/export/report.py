"""The report of an export: what went in, what came out, and what was proved about it, as one JSON document."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rep_backbones.export.files import replacing
from rep_backbones.foreign.fusing import Found
from rep_backbones.verify import Report as Comparison

SCHEMA = "rep_backbones/fuse_export/1"
_PACKAGES = (
    "torch",
    "torchvision",
    "ultralytics",
    "onnx",
    "onnxruntime",
    "onnxslim",
    "openvino",
    "ncnn",
    "pnnx",
    "tensorrt",
    "timm",
)


@dataclass(frozen=True)
class Counts:
    """The size of a model: layers with branches, convolutions, parameters, and GFLOPs for one picture of the given size."""

    multi_branch_layers: int
    convs: int
    parameters: int
    gflops: float


@dataclass(frozen=True)
class LayerProof:
    """One multi-branch layer and its convolution, on the inputs that it meets in the network.

    `error` is the largest difference of the outputs as a fraction of their range. `shares` tells of each branch the norm of
    its kernel over the sum of the norms: 0 is a branch that does nothing.
    """

    path: str
    type: str
    branches: list[str]
    kernel: list[int]
    stride: list[int]
    groups: int
    error: float
    ok: bool
    shares: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """Filled while the work goes on, so that a failure leaves what was known until then."""

    source: dict[str, Any]
    settings: dict[str, Any]
    status: int = 0
    counts: dict[str, Counts] = field(default_factory=dict)  # "before" and "after"
    layers: list[LayerProof] = field(default_factory=list)
    foreign: list[Found] = field(default_factory=list)  # layers without a rule, measured
    proofs: dict[str, Any] = field(default_factory=dict)  # name -> as `proof`
    trained: dict[str, Any] = field(default_factory=dict)  # of the multi-branch form: latency and ap, where measured
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)  # format -> path, sha256, error, ...
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        about = {"schema": SCHEMA, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions()}
        return {**about, **asdict(self)}

    def write(self, path: Path) -> None:
        """As `write_json`."""
        write_json(path, self.as_dict())


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON; NaN and infinity, which JSON has not, become null.

    Raises:
        TargetError: `path` cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def proof(report: Comparison) -> dict[str, Any]:
    """What `verify` found, as plain data."""
    return {"ok": report.ok, "error": report.error, "outputs": [{**asdict(d), "ok": d.ok} for d in report.differences]}


def versions() -> dict[str, str]:
    """Python, this package, and those that take part where they are installed."""
    from rep_backbones import __version__  # this room is imported while the package is

    found = {"python": platform.python_version(), "rep_backbones": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal; of a folder, that of the lines "<hash>  <name>" of its files, sorted by name.

    That is what `sha256sum` prints for the names relative to the folder, so a folder's can be checked by hand.
    """
    if path.is_dir():
        lines = (f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files_in(path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in files_in(path)) if path.is_dir() else path.stat().st_size


def files_in(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by their names relative to it."""
    return sorted(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.relative_to(folder).as_posix()
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value

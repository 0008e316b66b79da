"""Fuses the branches of a model of which only the ONNX file is there, and proves the result with ONNX Runtime.

python tools/fuse_onnx.py model.onnx            # writes model_fused.onnx and model_fused_report.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from rep_backbones.export.files import replacing, writable_folder
from rep_backbones.export.onnx_fuse import Fused, fuse_onnx
from rep_backbones.export.onnx_proof import prove
from rep_backbones.export.report import proof, sha256, versions, write_json
from rep_backbones.verify import Mismatch, Report
from rep_backbones.yolo.command import ended

SCHEMA = "rep_backbones/fuse_onnx/1"
PROVED, UNPROVED = 0, 3


@dataclass(frozen=True)
class Outcome:
    """What a run made: the file, under `.unproved` if its proof failed, and what was fused in it."""

    status: int
    path: Path
    fused: list[Fused]
    proof: Report


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 proved, 2 bad input or target, 3 not proved (the file is called so), 130 interrupted."""
    parser = argparse.ArgumentParser(prog="fuse_onnx.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an ONNX file with weights in float32 or float16")
    parser.add_argument("--out", type=Path, help="folder to write to (default: that of the model)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the pictures of the proof")
    options = parser.parse_args(argv)
    return ended("fuse_onnx", lambda: run(options.model, out=options.out, size=options.size).status)


def run(path: Path, *, out: Path | None = None, size: Sequence[int] | None = None) -> Outcome:
    """Fuse a file into `<stem>_fused.onnx`, with a report in JSON beside it, and print what was done.

    Args:
        out: the folder to write to, made if missing; by default that of `path`.
        size: (height, width) in pixels of the proof's pictures, where the graph leaves them open.

    Raises:
        ValueError: the file is missing, damaged, over 2 GB, or does not run.
        TargetError: the target cannot be written.
    """
    if size is not None and min(size) < 1:
        raise ValueError(
            f"--size {' '.join(map(str, size))} is not accepted; give height and width in pixels, such as 640 640"
        )
    model = _opened(path)
    target = writable_folder(out or path.parent)
    made, fused = fuse_onnx(model)
    for each in fused:
        print(each)
    before, after = _convs(model), _convs(made)
    failure = ""
    try:
        compared = prove(model, made, [each.output for each in fused], size=(size[0], size[1]) if size else None)
    except Mismatch as error:
        compared, failure = Report(), str(error)
    if not compared.ok:
        failure = failure or str(compared)
    file = target / f"{path.stem}_fused{'' if compared.ok else '.unproved'}.onnx"
    with replacing(file) as temporary:
        temporary.write_bytes(made.SerializeToString())
    errors = {difference.name: difference.error for difference in compared.differences}
    write_json(target / f"{path.stem}_fused_report.json", _report(path, file, model, made, fused, compared, errors))
    print(
        f"{len(fused)} multi-branch layers fused: {before} -> {after} convolutions, {len(model.graph.node)} -> "
        f"{len(made.graph.node)} nodes, largest error {compared.error:.1e} of a tensor's range"
    )
    if not fused:
        print("the graph holds no affine branches that one convolution could stand for; the file is a copy")
    if failure:
        print(f"NOT PROVED: {failure}")
    print(f"{'wrote' if compared.ok else 'kept as'} {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return Outcome(PROVED if compared.ok else UNPROVED, file, fused, compared)


def _opened(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of an ONNX file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        model.SerializeToString()
    except Exception as error:  # protobuf, onnx and the file system have an exception type each
        raise ValueError(f"{path} is not an ONNX model that can be read (up to 2 GB): {error}") from error
    return model


def _convs(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in model.graph.node)


def _report(
    path: Path,
    file: Path,
    model: onnx.ModelProto,
    made: onnx.ModelProto,
    fused: Sequence[Fused],
    compared: Report,
    errors: dict[str, float],
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "source": {"path": path.name, "sha256": sha256(path)},
        "artifact": {"path": file.name, "sha256": sha256(file), "proved": compared.ok, **proof(compared)},
        "counts": {
            "before": {"nodes": len(model.graph.node), "convs": _convs(model)},
            "after": {"nodes": len(made.graph.node), "convs": _convs(made)},
        },
        "layers": [
            {
                "output": each.output,
                "source": each.source,
                "nodes": each.nodes,
                "convs": each.convs,
                "kernel": list(each.value.kernel_size),
                "stride": list(each.value.stride),
                "groups": each.value.groups,
                "multiplications": {"before": each.macs[0], "after": each.macs[1]},
                "error": errors.get(each.output),
            }
            for each in fused
        ],
        "versions": versions(),
    }

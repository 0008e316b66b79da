"""Kills `fuse_export` at random moments: `python killing.py WEIGHTS RUNS SEED` prints what became of the files, as JSON.

All is imported once; each run is a fork that calls main() beside the artefacts of an older run, and is killed (SIGKILL)
within the time that a whole run takes. A run that is called `replace K` kills itself at its K-th os.replace instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import torch

import rep_backbones.yolo.artifacts  # noqa: F401  what a run imports late, so that a fork need not
from rep_backbones.export import files
from rep_backbones.export.onnx_model import OnnxModel  # noqa: F401
from rep_backbones.yolo.fuse_export_cli import main

Start = Callable[[list[str]], int]


def forked(argv: list[str], replace: int | None = None) -> int:
    """The process id of a fork that runs main(argv)."""
    process = os.fork()
    if process:
        return process
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if replace is not None:
            files.os = Counting(replace)  # type: ignore[assignment]
        status = main(argv)
    os._exit(status)


class Counting:
    """`os`, whose K-th replace kills the process instead."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def replace(self, source: Path, target: Path) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        os.replace(source, target)


def content(path: Path) -> str:
    """What a whole file says, without the times in it; raises for one that is not whole."""
    digest = hashlib.sha256()
    if path.suffix == ".pt":
        for key, tensor in torch.load(path, weights_only=False)["model"].state_dict().items():
            digest.update(key.encode() + tensor.numpy().tobytes())
    elif path.suffix == ".onnx":
        model = onnx.load(path)
        onnx.checker.check_model(model)
        digest.update(model.graph.SerializeToString(deterministic=True))
    elif path.suffix == ".html":
        page = path.read_text()
        if not page.rstrip().endswith("</html>"):
            raise ValueError("it breaks off")
        digest.update(re.findall(r'class="mono">([0-9a-f]{64})<', page)[0].encode())  # of the checkpoint that it is about
    else:
        report = json.loads(path.read_text())
        digest.update(str((report["source"]["sha256"], sorted(report["artifacts"]), report["status"])).encode())
    return digest.hexdigest()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: content(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def problems(folder: Path, old: dict[str, str], new: dict[str, str]) -> Iterable[str]:
    """What is wrong in a folder after a kill: each file must be there, whole, the old or the new one."""
    whole = {}
    for name in sorted(old.keys() | {path.name for path in folder.iterdir() if not path.name.startswith(".")}):
        if name not in old:
            yield f"{name} is no name of an artefact"
            continue
        try:
            whole[name] = content(folder / name)
        except Exception as error:
            yield f"{name} is not whole ({type(error).__name__}: {error})"
            continue
        if whole[name] not in (old[name], new[name]):
            yield f"{name} is neither the old nor the new one"
    report = folder / "best_deploy_report.json"
    if whole.get(report.name) == new[report.name]:
        for about in json.loads(report.read_text())["artifacts"].values():
            made = folder / about["path"]
            if not made.exists() or hashlib.sha256(made.read_bytes()).hexdigest() != about["sha256"]:
                yield f"the new report does not belong to {about['path']}"


def run(weights: Path, runs: int, seed: int) -> dict[str, object]:
    room, rng = weights.parent, random.Random(seed)
    old_folder, folder = room / "old", room / "out"
    argv = [str(weights), "--format", "onnx", "--out", str(folder)]
    started = time.perf_counter()
    assert os.waitpid(forked(argv), 0)[1] == 0
    whole = time.perf_counter() - started
    old, new = contents(old_folder), contents(folder)
    assert old.keys() == new.keys() and not set(old.values()) & set(new.values())
    moments: list[float | int] = [*range(len(new) + 2), *(rng.uniform(0, whole) for _ in range(runs))]
    killed, found = 0, []
    for moment in moments:
        shutil.rmtree(folder)
        shutil.copytree(old_folder, folder)
        process = forked(argv, moment if isinstance(moment, int) else None)
        if isinstance(moment, float):
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        killed += os.WIFSIGNALED(status)
        found += [f"{moment}: {problem}" for problem in problems(folder, old, new)]
    status = os.waitpid(forked(argv), 0)[1]
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return {"runs": len(moments), "killed": killed, "problems": found, "last": status, "left": left}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))

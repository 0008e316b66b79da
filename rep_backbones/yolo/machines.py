"""Training in processes that torchrun has started, on one machine or on several.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m rep_backbones.yolo.cli train model=... data=...

Ultralytics counts the GPUs of its own machine and starts a process for each; in a process that was started for it, it knows
its rank, but takes that count for the number of all processes. Here that number comes from torchrun. All processes take the
run's folder from the first one, which alone writes into it: the others read best.pt and last.pt there, so that the folder
must be on storage that all machines see.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from ultralytics.utils import RANK


def world_size() -> int:
    """How many processes train together on all machines; 1 for a process that torchrun has not started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if RANK != -1 else 1


def place(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer for this process: the GPUs of its machine, and a folder that no other run has.

    Raises:
        ValueError: `device` names another number of GPUs than torchrun has started processes on this machine, or this has
            none; or the batch size is to be found.
    """
    given = dict(arguments)
    if world_size() == 1:
        return given
    given["device"] = devices(given.get("device"))
    if isinstance(batch := given.get("batch"), (int, float)) and batch < 1:
        raise ValueError(
            f"batch={batch} asks for the largest batch that fits, which is found in one process only; give a whole number, "
            f"for all {world_size()} processes together"
        )
    if RANK > 0 and not given.get("save_dir") and not given.get("resume"):
        # Ultralytics removes the results.csv of the folder; until `share_folder` that may be the one of an earlier run
        given["name"] = f".rank{RANK}"
    return given


def devices(given: Any) -> str:
    """The GPUs of this machine as Ultralytics takes them, one for each of its processes: "0,1,2"."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if given in (None, "") and torch.cuda.is_available():
        given = list(range(processes))
    named = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given if given is not None else "")
    count = sum(word.strip().isdigit() for word in named.rpartition(":")[2].strip("[]() ").split(","))
    if count != processes:
        raise ValueError(
            f"torchrun has started {processes} processes on this machine, where PyTorch sees {torch.cuda.device_count()} "
            f"GPUs and device={named or 'none'} names {count}. Each process takes one GPU: give their number as "
            "--nproc-per-node, and leave device= out"
        )
    return named


def share_folder(trainer: Any) -> None:
    """Give a trainer the run's folder of the first process; to be called when the process group is there.

    Raises:
        RuntimeError: in all processes, if one of them does not see the folder.
    """
    folder = [str(trainer.save_dir)]
    distributed.broadcast_object_list(folder, src=0)
    if trainer.save_dir.name == f".rank{RANK}" and trainer.save_dir.is_dir():  # up to 8.4 it is made when it is named
        trainer.save_dir.rmdir()
    trainer.save_dir = Path(folder[0])
    trainer.wdir = trainer.save_dir / "weights"
    trainer.last, trainer.best = trainer.wdir / "last.pt", trainer.wdir / "best.pt"
    trainer.csv = trainer.save_dir / "results.csv"
    trainer.args.save_dir, trainer.args.name = str(trainer.save_dir), trainer.save_dir.name
    blind: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(blind, None if trainer.wdir.is_dir() else socket.gethostname())
    if machines := sorted({name for name in blind if name}):
        raise RuntimeError(
            f"{', '.join(machines)} cannot see {trainer.wdir}, where the first process writes its checkpoints and all read "
            "them; give project= a folder on storage that all machines share"
        )

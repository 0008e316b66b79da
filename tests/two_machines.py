"""One of several processes that torchrun started, each as if on a machine of its own, training on a CPU.

    torchrun --nnodes 2 ... two_machines.py RESULT_FOLDER JSON_OVERRIDES

What Ultralytics has for GPUs only is replaced (see gloo_trainer.py); the number of processes, the folder of the run and the
GPUs are the package's to find.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gloo_trainer import CpuTrainer, digest
from torch import distributed
from ultralytics.utils import RANK

from rep_backbones.yolo import machines
from rep_backbones.yolo.trainer import KeepsBranches


class OnCpus(CpuTrainer):
    """The stock trainer as it is on one machine, which takes its own devices for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = 0

    def _setup_ddp(self) -> None:
        """Meet the others where torchrun says."""
        distributed.init_process_group("gloo", rank=RANK, world_size=self.world_size)


class Trainer(KeepsBranches, OnCpus):
    """The same with this package's hook."""


def main() -> None:
    """Train, and leave what this process has in RESULT_FOLDER/rank<RANK>.json."""
    torch.set_num_threads(1)
    with mock.patch.object(machines, "devices", lambda given: given):
        trainer = Trainer(overrides=json.loads(sys.argv[2]))
    before = str(trainer.save_dir)
    trainer.train()
    place = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")}
    result = {
        "parameters": digest(trainer.model),
        "folder": str(trainer.save_dir),
        "before": before,
        "pictures": len(trainer.train_loader.sampler),
        "world": trainer.world_size,
        "buffers": float(sum(b.double().sum() for b in trainer.model.buffers())),
        **place,
    }
    (Path(sys.argv[1]) / f"rank{RANK}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

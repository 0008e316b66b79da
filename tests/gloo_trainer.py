"""Two processes that train one model on CPUs: Ultralytics has DDP for GPUs only, so its CUDA calls are replaced here.

Run by test_training_slow.py, once per process, with RANK, LOCAL_RANK and WORLD_SIZE set:

    python gloo_trainer.py RENDEZVOUS_FILE RESULT_FOLDER JSON_OVERRIDES
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import strip_optimizer, unwrap_model

from rep_backbones.yolo import machines
from rep_backbones.yolo.trainer import KeepsBranches


class CpuTrainer(DetectionTrainer):
    """The stock trainer in one of several processes on CPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = int(os.environ["WORLD_SIZE"])

    def _setup_ddp(self) -> None:
        """Meet the other process in the file that the test names."""
        distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=RANK, world_size=self.world_size)

    def _setup_train(self, *args: Any) -> None:
        stock = nn.parallel.DistributedDataParallel

        def on_cpu(model: nn.Module, device_ids: Any = None, **kwargs: Any) -> nn.Module:
            return stock(model, **kwargs)

        with mock.patch.object(nn.parallel, "DistributedDataParallel", on_cpu):
            super()._setup_train(*args)

    def final_eval(self) -> None:
        """Without the validation, which asks CUDA for its device in each process."""
        if RANK == 0:
            strip_optimizer(self.last)
            strip_optimizer(self.best)
        distributed.barrier()


class GlooTrainer(KeepsBranches, CpuTrainer):
    """The same with this package's hook."""


def digest(model: nn.Module) -> str:
    """A hash over the bytes of all parameters."""
    sha = hashlib.sha256()
    for name, parameter in sorted(unwrap_model(model).named_parameters()):
        sha.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    """Train, and leave what this process has in RESULT_FOLDER/rank<RANK>.json."""
    torch.set_num_threads(1)
    with mock.patch.object(machines, "devices", lambda given: given):  # which are GPUs
        trainer = GlooTrainer(overrides=json.loads(sys.argv[3]))
    seen: list[str] = []

    def on_train_batch_start(trainer: Any) -> None:
        seen.append(digest(trainer.model))

    trainer.add_callback("on_train_batch_start", on_train_batch_start)
    trainer.train()
    result = {"parameters": digest(trainer.model), "steps": seen, "wrapped": type(trainer.model).__name__}
    (Path(sys.argv[2]) / f"rank{RANK}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

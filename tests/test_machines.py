"""Training in processes of torchrun, on one machine or several: what each takes from its environment, and from the first."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from yolo_helpers import model_yaml, tiny_data, train_args  # noqa: F401

from rep_backbones.rules import multi_branch
from rep_backbones.yolo import machines
from rep_backbones.yolo.checkpoint import load_precise

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if torchrun had started this process, on a machine with a number of GPUs."""

    def start(rank: int = 3, world: int = 4, here: int = 2, gpus: int = 2) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        monkeypatch.setattr(machines, "RANK", rank)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return start


def test_a_process_that_torchrun_has_not_started_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"device": "cpu", "batch": -1}
    assert machines.world_size() == 1 and machines.place(given) == given
    monkeypatch.setenv("WORLD_SIZE", "8")  # which some clusters set for every process
    assert machines.world_size() == 1 and machines.place(given) == given


def test_the_number_of_processes_is_that_of_all_machines(started: Any) -> None:
    started(world=16, here=8)
    assert machines.world_size() == 16


@pytest.mark.parametrize(
    ("given", "taken"),
    [(None, "0,1"), ("", "0,1"), ("0,1", "0,1"), ([2, 3], "2,3"), ("cuda:0,1", "cuda:0,1"), ("npu:0,1", "npu:0,1")],
)
def test_each_process_of_a_machine_has_a_gpu(started: Any, given: Any, taken: str) -> None:
    started()
    assert machines.place({"device": given})["device"] == taken


@pytest.mark.parametrize("device", ["cpu", "0", "0,1,2", "", -1])
def test_another_number_of_gpus_is_refused(started: Any, device: Any) -> None:
    started(gpus=0)
    with pytest.raises(ValueError, match="torchrun has started 2 processes on this machine") as caught:
        machines.place({"device": device})
    assert "--nproc-per-node" in str(caught.value) and "0 GPUs" in str(caught.value)


@pytest.mark.parametrize("batch", [-1, 0.7])
def test_a_batch_that_is_to_be_found_is_refused(started: Any, batch: float) -> None:
    started()
    with pytest.raises(ValueError, match=f"batch={batch} .*whole number, for all 4 processes"):
        machines.place({"batch": batch})


def test_only_the_first_process_chooses_the_folder(started: Any) -> None:
    started(rank=0)
    assert "name" not in machines.place({})
    started(rank=1)
    assert machines.place({"name": "mine"})["name"] == ".rank1", "in which there is no results.csv that it could remove"
    assert machines.place({"name": "mine", "save_dir": "runs/mine"})["name"] == "mine"
    assert "name" not in machines.place({"resume": "last.pt"})


def test_a_folder_that_a_machine_does_not_see_is_refused_by_all(tmp_path: Path) -> None:
    trainer = SimpleNamespace(save_dir=tmp_path / "run", args=SimpleNamespace())
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=f"{socket.gethostname()} cannot see .*run.weights.*project="):
            machines.share_folder(trainer)
        (tmp_path / "run" / "weights").mkdir(parents=True)
        machines.share_folder(trainer)
    finally:
        distributed.destroy_process_group()
    assert trainer.best == tmp_path / "run" / "weights" / "best.pt" and trainer.csv == tmp_path / "run" / "results.csv"
    assert trainer.args.name == "run" and trainer.args.save_dir == str(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["plain", "equivalent"])
def test_two_machines_learn_the_same_and_the_first_writes(tmp_path: Path, tiny_data: Path, decay: str) -> None:  # noqa: F811
    """Two torchruns that meet as two nodes do, each with one process; an earlier run's folder lies beside."""
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "results.csv").write_text("of an earlier run\n")
    overrides = {
        "model": str(model_yaml(tmp_path)),
        **train_args(tiny_data, tmp_path, exist_ok=False, decay=decay, weight_decay=0.1, momentum=0.5),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    script = [str(ROOT / "tests" / "two_machines.py"), str(tmp_path), json.dumps(overrides)]
    logs = [tmp_path / f"log{node}.txt" for node in range(2)]
    nodes = []
    for node, log in enumerate(logs):
        with log.open("w") as stream:
            command = [*torchrun, "--node-rank", str(node), *script]
            nodes.append(subprocess.Popen(command, env=env, stdout=stream, stderr=stream))
    try:
        for node, log in zip(nodes, logs):
            assert node.wait(300) == 0, log.read_text()[-4000:]
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert [(r["RANK"], r["LOCAL_RANK"], r["GROUP_RANK"]) for r in (first, second)] == [("0", "0", "0"), ("1", "0", "1")]
    assert first["world"] == second["world"] == 2
    assert first["pictures"] == second["pictures"] == 4, "each sees half of the eight"
    assert first["buffers"] != second["buffers"], "their norms saw other pictures"
    assert first["parameters"] == second["parameters"]
    assert first["folder"] == second["folder"] == first["before"] != second["before"]
    run = Path(first["folder"])
    assert run != earlier and (earlier / "results.csv").read_text() == "of an earlier run\n"
    assert sorted(file.name for file in earlier.iterdir()) == ["results.csv"]
    assert not list(tmp_path.glob(".rank*")), "the second writes nothing"
    assert sorted(file.name for file in (run / "weights").iterdir()) == [
        "best.pt",
        "best_deploy.pt",
        "best_fp32.pt",
        "last.pt",
    ]
    assert len((run / "results.csv").read_text().splitlines()) == 1 + 2, "a header and two epochs"
    assert len(multi_branch(load_precise(run / "weights" / "best.pt").model)) == 4

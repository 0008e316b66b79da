"""`rep-yolo`: the grammar of `yolo`, our trainers, checked files; a message and a status for every bad input."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import ultralytics.cfg
import ultralytics.engine.model
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.utils import SETTINGS, checks
from yolo_helpers import model_yaml, tiny_data  # noqa: F401

from rep_backbones.rules import multi_branch
from rep_backbones.yolo import checkpoint
from rep_backbones.yolo.cli import main
from rep_backbones.yolo.trainer import TRAINERS


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(scope="session")
def room(tmp_path_factory, tiny_data):  # noqa: F811
    """A folder with a YAML, a checkpoint and a picture."""
    room = tmp_path_factory.mktemp("room")
    model = model_yaml(room)
    yolo = YOLO(str(model))
    yolo.model.args, yolo.model.task = {}, "detect"
    yolo.model.names = {0: "disc", 1: "box", 2: "cross"}
    torch.save({"model": yolo.model.half(), "train_args": {"task": "detect"}}, room / "tiny.pt")
    cv2.imwrite(str(room / "picture.png"), np.full((64, 64, 3), 90, np.uint8))
    (room / "empty.pt").touch()
    (room / "truncated.pt").write_bytes((room / "tiny.pt").read_bytes()[:5000])
    (room / "foreign.pt").write_bytes(pickle.dumps({"weights": [1, 2]}))
    (room / "wrong.yaml").write_text(model.read_text().replace("RepConv", "RepCnov"))
    (room / "counts.yaml").write_text(
        model.read_text().replace("RepConv, [32, 3, 2]", "RepConv, [32, 3, 2, 1, 1, 1, true, 8, 9]")
    )
    (room / "evil.yaml").write_text(
        f"activation: __import__('pathlib').Path({str(room / 'trace')!r}).touch()\n" + model.read_text()
    )
    return room


@pytest.fixture
def inside(room, monkeypatch):
    monkeypatch.chdir(room)
    (room / "trace").unlink(missing_ok=True)
    return room


QUIET = ["imgsz=64", "plots=False", "verbose=False", "workers=0", "exist_ok=True", "device=cpu"]


def command(*args):
    return main([*args])


# ---- what it runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny.pt", "tiny-mixed-detect.yaml", "./tiny-mixed-detect.yaml"])
def test_predict_runs_as_yolo_does(inside, model, capsys):
    assert command("predict", f"model={model}", "source=picture.png", f"project={inside}/runs", "name=predict", *QUIET) == 0
    assert (inside / "runs/predict/picture.jpg").is_file()
    assert "rep-yolo:" not in capsys.readouterr().err


@pytest.mark.filterwarnings(
    "ignore:.*legacy TorchScript-based ONNX", "ignore:The feature will be removed", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_val_and_export_run(inside, tiny_data):  # noqa: F811
    assert command("val", "model=tiny.pt", f"data={tiny_data}", "batch=4", f"project={inside}/runs", "name=val", *QUIET) == 0
    assert (
        command("export", "model", "=", "tiny.pt", "format=onnx", "imgsz=64", "simplify=False", "opset=17", "device=cpu")
        == 0
    )
    assert (inside / "tiny.onnx").is_file()


def test_train_uses_our_trainers_and_leaves_ultralytics_as_it_was(inside, monkeypatch):
    def state():
        replaced = (Model._smart_load, tasks.torch_safe_load, tasks.parse_model, checks.AUTOINSTALL)
        return (*replaced, ultralytics.cfg.ARGV, ultralytics.engine.model.ARGV)

    before, chosen = state(), {}

    def train(self, **kwargs):
        chosen[self.task] = self._smart_load("trainer")

    monkeypatch.setattr(Model, "train", train)
    for task in TRAINERS:
        file = model_yaml(inside, task=task)
        assert command("train", f"model={file}", "data=coco8.yaml", "epochs=1") == 0
    assert chosen == TRAINERS
    assert all(a is b for a, b in zip(before, state(), strict=True))


def test_a_packaged_model_is_found_by_name(inside, monkeypatch):
    seen = []
    monkeypatch.setattr(Model, "train", lambda self, **kwargs: seen.append(self))
    assert command("train", "model=efficientrep-n.yaml", "data=coco8.yaml") == 0
    assert seen[0].model.yaml["scale"] == "n" and multi_branch(seen[0].model.model)


def test_the_console_command_shows_the_help_and_the_version(inside):
    code = "import sys; from rep_backbones.yolo.cli import main; sys.exit(main(['version']) or main([]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and ultralytics.__version__ in done.stdout + done.stderr
    assert "yolo TASK MODE ARGS" in done.stdout + done.stderr


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "modle=x.yaml"], "'modle' is not a valid YOLO argument"),
        (["trian", "model=tiny.pt"], "trian"),
        (["predict", "model=tiny.pt", "imgsz"], "'imgsz' is a valid YOLO argument but is missing an '='"),
        (["predict", "model=tiny.pt", "source=nothere.png"], "nothere.png"),
        (["predict", "model=missing.pt", "source=picture.png"], "'missing.pt' does not exist"),
        (["predict", "model=empty.pt", "source=picture.png"], "empty.pt"),
        (["predict", "model=truncated.pt", "source=picture.png"], "truncated.pt"),
        (["predict", "model=foreign.pt", "source=picture.png"], "foreign.pt"),
        (["predict", "model=tiny.pt", "source=picture.png", "conf=high"], "conf"),
        (["predict", "model=tiny.pt", "source=picture.png", "trust=perhaps"], "trust takes True or False, got 'perhaps'"),
        (["train", "model=eficientrep-n.yaml", "data=coco8.yaml"], "Did you mean efficientrep-n.yaml"),
        (["train", "model=wrong.yaml", "data=coco8.yaml"], "RepCnov"),
        (["train", "model=counts.yaml", "data=coco8.yaml"], "RepConv takes [c2, k"),
        (["train", "model=evil.yaml", "data=coco8.yaml"], "activation"),
        (["val", "model=tiny.pt", "data=nothere.yaml"], "nothere.yaml"),
        (["export", "model=tiny.pt", "format=floppy"], "floppy"),
    ],
)
def test_bad_input_is_one_line_and_status_2(inside, args, said, capsys):
    assert command(*args) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rep-yolo:")]
    assert len(err) == 1 and said in err[0]
    assert not (inside / "trace").exists()


@pytest.mark.parametrize("name", ["evil.pt", "yolo_nas_evil.pt", "sam2_evil.pt"])
@pytest.mark.parametrize("key", ["model={}", "pretrained={}", "cfg=evil_cfg.yaml"])
def test_nothing_in_a_checkpoint_is_executed(inside, name, key, capsys):
    torch.save({"model": Evil(inside / "trace")}, inside / name)
    (inside / "evil_cfg.yaml").write_text(f"model: {name}\n")
    assert command("train", "model=tiny-mixed-detect.yaml", "data=coco8.yaml", key.format(name)) == 2
    assert name in capsys.readouterr().err and not (inside / "trace").exists()


def test_a_checkpoint_that_ultralytics_finds_elsewhere_is_checked_too(inside, monkeypatch, capsys):
    (inside / "weights").mkdir(exist_ok=True)
    torch.save({"model": Evil(inside / "trace")}, inside / "weights/hidden.pt")
    monkeypatch.setitem(SETTINGS, "weights_dir", str(inside / "weights"))
    assert command("predict", "model=hidden.pt", "source=picture.png") == 2
    assert "hidden.pt" in capsys.readouterr().err and not (inside / "trace").exists()


@pytest.mark.parametrize("trust", ["trust=True", "trust", "--trust", "trust=1"])
def test_trust_reads_it_the_old_way(inside, trust, monkeypatch):
    torch.save({"model": Evil(inside / "trace")}, inside / "evil.pt")
    assert command("predict", "model=evil.pt", "source=picture.png", trust) != 0
    assert (inside / "trace").exists(), "the check stands between the file and the unpickler"
    monkeypatch.setattr(checkpoint, "check", lambda path: pytest.fail("checked"))
    assert command("predict", "model=tiny.pt", "source=picture.png", trust, f"project={inside}/runs", *QUIET) == 0


def test_interrupt_is_130(inside, monkeypatch, capsys):
    def predict(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "predict", predict)
    assert command("predict", "model=tiny.pt", "source=picture.png") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "rep-yolo: interrupted"


def test_a_failure_that_is_no_input_is_status_1_and_can_be_traced(inside, monkeypatch, capsys):
    def predict(self, **kwargs):
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(Model, "predict", predict)
    assert command("predict", "model=tiny.pt", "source=picture.png") == 1
    err = capsys.readouterr().err
    assert "RuntimeError: out of memory" in err and "Traceback" not in err
    monkeypatch.setenv("REP_YOLO_TRACEBACK", "1")
    assert command("predict", "model=tiny.pt", "source=picture.png") == 1
    assert "Traceback" in capsys.readouterr().err

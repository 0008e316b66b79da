"""Registration: once, refused where Ultralytics is not the one it was made for, carried into workers and restricted
loading.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import dist

import rep_backbones
from rep_backbones.registry import LAYERS, Layer
from rep_backbones.yolo.install import OLDEST, install, safe_classes, self_test, unsupported


def wrapped():
    return [
        tasks.parse_model,
        ultralytics.nn.parse_model,
        tasks.check_yaml,
        tasks.guess_model_scale,
        BaseModel.fuse,
        BaseModel.is_fused,
    ]


def test_a_second_registration_changes_nothing():
    before, generate = wrapped(), dist.generate_ddp_file
    install()
    assert all(a is b for a, b in zip(before, wrapped(), strict=True)) and dist.generate_ddp_file is generate
    for function in before:
        assert not hasattr(function.__wrapped__, "__wrapped__"), "one wrapper, not several"


@pytest.mark.parametrize("version", ["8.3.251", "8.2.0", "8.3.9"])
def test_an_older_release_is_refused_by_name(monkeypatch, version):
    monkeypatch.delattr(tasks, "_rep_backbones")
    monkeypatch.setattr(tasks, "parse_model", tasks.parse_model.__wrapped__)
    monkeypatch.setattr(ultralytics, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"ultralytics {version}: it is older.*8\.3\.252 to 8\.4\.190"):
        install()
    assert not hasattr(tasks.parse_model, "__wrapped__")


def test_a_newer_release_that_passes_the_self_test_is_accepted(monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "9.1.0")
    seen = []
    self_test(lambda d, ch, verbose: seen.append(ch) or tasks.parse_model(d, ch, verbose))
    assert seen == [3], "it was parsed, and nothing raised"


def _raises(d, ch, verbose):
    raise KeyError("c2")


def _narrow(d, ch, verbose):
    layers, save = tasks.parse_model({**d, "scales": {"n": [0.5, 0.25, 64]}}, ch, verbose)
    return layers, save


def _unsaved(d, ch, verbose):
    return tasks.parse_model(d, ch, verbose)[0], []


@pytest.mark.parametrize("parser", [_raises, _narrow, _unsaved, lambda *_, **__: (nn.Sequential(), [])])
def test_a_parser_that_does_otherwise_is_refused(parser):
    with pytest.raises(RuntimeError, match=rf"ultralytics {ultralytics.__version__}: its model parser .*{OLDEST} to"):
        self_test(parser)


def test_the_self_test_leaves_no_trace():
    legacy, state = Detect.legacy, torch.get_rng_state()
    for value in (True, False):
        Detect.legacy = value
        self_test(tasks.parse_model)
        assert Detect.legacy is value
    Detect.legacy = legacy
    assert torch.equal(torch.get_rng_state(), state)


def test_the_message_says_what_to_install():
    assert "pip install 'ultralytics>=8.3.252,<=8.4.190'" in str(unsupported("it differs"))


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_our_layers_load_with_weights_only(name, tmp_path):
    layer = LAYERS[name].cls(16, 16)
    torch.save(nn.Sequential(layer), tmp_path / "layer.pt")
    plain = [cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    with torch.serialization.safe_globals([*plain, set]):
        again = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert repr(again[0]) == repr(layer)
    assert LAYERS[name].cls in safe_classes()


# ---- workers of a training on several GPUs -------------------------------------------------------------------------------


MODULE = """
from pathlib import Path

from torch import nn
from ultralytics.nn import tasks

import rep_backbones


@rep_backbones.register_layer
class OfTheUser(nn.Conv2d):
    def __init__(self, c1, c2, k=1):
        super().__init__(c1, c2, k)


class Probe:
    '''Stands for a trainer: tells what the worker knows.'''

    def __init__(self, cfg=None, overrides=None, _callbacks=None):
        self.args = type("Args", (), {"model": ""})()
        self.report = overrides["report"]

    def train(self):
        rows = [[-1, 1, "RepConv", [8]], [-1, 1, "OfTheUser", [16, 1]]]
        layers, _ = tasks.parse_model({"nc": 1, "backbone": rows, "head": []}, ch=3, verbose=False)
        Path(self.report).write_text(" ".join(type(layer).__name__ for layer in layers))
"""


def test_workers_know_our_layers_and_the_users(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(LAYERS)
    try:
        import module_of_the_user as user

        report = tmp_path / "report.txt"
        trainer = user.Probe(overrides={"report": str(report)})
        trainer.args, trainer.model, trainer.callbacks, trainer.hub_session = (
            SimpleNamespace(report=str(report), model=""),
            "x.yaml",
            {},
            None,
        )
        file = Path(dist.generate_ddp_file(trainer))
        try:
            done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=tmp_path, check=False)
        finally:
            file.unlink()
            file.with_suffix(".pt").unlink(missing_ok=True)
        assert done.returncode == 0, done.stderr
        assert report.read_text() == "RepConv OfTheUser"
    finally:
        LAYERS.clear()
        LAYERS.update(known)
        sys.modules.pop("module_of_the_user", None)


def test_a_layer_that_workers_cannot_import_is_named(monkeypatch):
    mine = type("Mine", (nn.Conv2d,), {"__module__": "__main__"})
    monkeypatch.setitem(LAYERS, "Mine", Layer(mine, "Mine", "stage"))
    with pytest.raises(ValueError, match=r"cannot import Mine.*module of its own"):
        dist.generate_ddp_file(SimpleNamespace(args=SimpleNamespace(), model=""))


def test_importing_registers():
    assert callable(rep_backbones.register_layer) and hasattr(tasks.parse_model, "__wrapped__")


# of torch's compiler and of what draws, exports and measures: each takes a tenth of a second to seconds to load
HEAVY = {
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "scipy",
    "pandas",
    "jinja2",
    "thop",
}
MEASURING = """
import torch
from torch import nn

conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU())
rep_backbones.fuse(conv.eval(), foreign="measure", example=torch.rand(1, 3, 16, 16))
"""


@pytest.mark.parametrize("use", ["", MEASURING], ids=["import", "nothing to measure"])
def test_what_is_heavy_is_not_loaded_before_it_is_needed(use):
    lines = ["import sys", "from ultralytics import YOLO", "before = set(sys.modules)", "import rep_backbones", use]
    code = "\n".join([*lines, "print(*sorted(set(sys.modules) - before))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rep_backbones.fuse" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())

"""Fusing on every path of Ultralytics, the caller's own model left alone, and deploy models in stock classes."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from inspect import signature

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules import RepConv as StockRepConv
from ultralytics.nn.modules import RepVGGDW
from yolo_helpers import randomize_norms, tiny_data, train_args  # noqa: F401

import rep_backbones
from rep_backbones import containers
from rep_backbones.registry import LAYERS
from rep_backbones.rules import VIEWS, multi_branch
from rep_backbones.yolo.stock import STOCK, to_stock

MIXED = [
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "RepVGGBlock", [16, 3, 2, {"se": True}]],
    [-1, 2, "RepConv", [32, 3, 2]],
    [-1, 4, "BepC3", [32]],
    [-1, 1, "SimSPPF", [32]],
    [-1, 1, "SimCSPSPPF", [32]],
]


def detector(trunk=MIXED, head=None, seed=0):
    """A detector in train mode whose every kernel and statistic matters to its output."""
    torch.manual_seed(seed)
    head = head or [[[2, len(trunk) - 1], 1, "Detect", ["nc"]]]
    config = {"nc": 3, "scale": "n", "backbone": deepcopy(trunk), "head": deepcopy(head)}
    model = randomize_norms(tasks.DetectionModel(config, ch=3, nc=3, verbose=False))
    for branch in model.model[-1].cv3:  # a fresh head says 1e-4 for each class, whatever it is shown
        nn.init.normal_(branch[-1].weight, 0, 0.3)
    model.args, model.task = {}, "detect"
    return model


def outputs(model):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return deepcopy(model).eval()(x)[0]


def assert_same(left, right, tolerance=1e-5):
    for part in (slice(0, 4), slice(4, None)):
        a, b = left[:, part], right[:, part]
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def one_row(name):
    return detector([[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16]], [-1, 2, name, [16]]])


# ---- fuse and is_fused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_layer_fuses_in_an_ultralytics_model(name, mode):
    model = one_row(name).train(mode == "train")
    expected = outputs(model)
    assert not model.is_fused()
    fused = model.fuse(verbose=False)
    assert fused is model and model.is_fused() and not multi_branch(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(module.training == (mode == "train") for module in model.modules())
    assert_same(expected, outputs(model))
    layer = model.model[3]
    assert (layer.i, layer.f) == (3, -1) and name in layer.type
    assert layer.np == sum(p.numel() for p in layer.parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.fuse(verbose=False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "fusing again changes nothing"


def test_a_small_model_is_not_fused_before_it_is():
    model = detector([[-1, 1, "RepConv", [8, 3, 2]]], [[[0], 1, "Detect", ["nc"]]])
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) < 10  # "fused" to releases up to 8.4.100
    assert not model.is_fused()
    expected = outputs(model)
    assert model.fuse(verbose=False).is_fused()
    assert_same(expected, outputs(model))


def test_a_model_with_our_branches_left_is_not_fused():
    model = detector()
    tasks.BaseModel.fuse.__wrapped__(model, verbose=False)  # the stock layers only
    assert tasks.BaseModel.is_fused.__wrapped__(model) or "thresh" in signature(tasks.BaseModel.is_fused).parameters
    assert not model.is_fused()


def test_a_model_of_stock_layers_is_upstreams_own():
    model = detector(
        [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16]], [-1, 2, "C3k2", [16, False]]], [[[2], 1, "Detect", ["nc"]]]
    )
    assert model.is_fused() == tasks.BaseModel.is_fused.__wrapped__(model)
    expected = outputs(model)
    assert_same(expected, outputs(model.fuse(verbose=False)))


def test_a_model_that_cannot_be_merged_is_left_whole():
    model = detector()
    norm = next(m for m in model.model[2].modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = float("nan")
    with pytest.raises(ValueError, match="2"):
        model.fuse(verbose=False)
    assert len(multi_branch(model)) and model.training and not model.is_fused()


# ---- the stock multi-branch layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "c1"),
    [
        (lambda: StockRepConv(8, 8), 8),
        (lambda: StockRepConv(8, 8, bn=True), 8),
        (lambda: StockRepConv(8, 16, s=2, g=4, act=False), 8),
        (lambda: RepVGGDW(8), 8),
    ],
)
def test_stock_layers_are_folded_with_our_arithmetic(make, c1):
    layer = randomize_norms(make()).eval()
    x = torch.randn(2, c1, 13, 11)
    with torch.no_grad():
        expected = layer(x)
        ours = rep_backbones.fuse(layer)
        assert torch.allclose(ours(x), expected, atol=1e-5)
        assert sum(isinstance(m, nn.Conv2d) for m in ours.modules()) == 1 and not multi_branch(ours)
        # a layer that Ultralytics has fused before is seen as its one convolution
        (layer.fuse_convs if isinstance(layer, StockRepConv) else layer.fuse)()
        layer.forward = layer.forward_fuse
        assert torch.allclose(VIEWS[type(layer)](layer)(x), expected, atol=1e-5) and not multi_branch(layer)


def test_stock_multi_branch_layers_fuse_in_a_small_model():
    trunk = [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 2, "RepC3", [16]],
        [-1, 1, "C2fCIB", [16, True, True]],
        [-1, 1, "Conv", [16, 3, 2]],
    ]
    model = detector(trunk)
    assert {type(layer) for _, layer, _ in multi_branch(model)} == {StockRepConv, RepVGGDW}
    expected = outputs(model)
    assert not model.is_fused()
    model.fuse(verbose=False)
    assert not multi_branch(model) and not any(hasattr(m, "conv1") for m in model.modules())
    assert_same(expected, outputs(model))


# ---- every path that fuses -----------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path):
    """A YOLO around a detector of ours, as from a checkpoint on disk."""
    model = detector()
    torch.save({"model": model, "train_args": {"task": "detect"}}, tmp_path / "mixed.pt")
    return YOLO(tmp_path / "mixed.pt")


PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def test_predict_and_val_leave_the_callers_model_alone(yolo, tiny_data):  # noqa: F811
    before = {key: value.clone() for key, value in yolo.model.state_dict().items()}
    yolo.predict(PICTURE, imgsz=64, conf=0.001, verbose=False)
    assert not multi_branch(yolo.predictor.model.model) and yolo.predictor.model is not yolo.model
    yolo.val(data=str(tiny_data), imgsz=64, batch=4, workers=0, plots=False, verbose=False)
    assert multi_branch(yolo.model) and yolo.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in yolo.model.state_dict().items())
    assert all(parameter.requires_grad for name, parameter in yolo.model.named_parameters() if "dfl" not in name)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_export_fuses_a_copy(yolo, tmp_path):
    expected = outputs(yolo.model)
    file = yolo.export(format="torchscript", imgsz=64, batch=2, device="cpu")
    exported = torch.jit.load(file)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    assert_same(expected, exported(x), 1e-4)
    assert str(exported.inlined_graph).count("aten::batch_norm") == 0
    assert multi_branch(yolo.model)


def test_yolo_fuse_works_in_place(yolo):
    yolo.fuse()
    assert not multi_branch(yolo.model) and yolo.model.is_fused()


def test_plain_training_after_predict_trains_the_branches(yolo, tiny_data, tmp_path):  # noqa: F811
    yolo.predict(PICTURE, imgsz=64, verbose=False)
    yolo.train(**train_args(tiny_data, tmp_path, epochs=1))
    assert len(multi_branch(yolo.model)) == len(multi_branch(detector())), "best.pt holds the branches"
    assert yolo.model.yaml["backbone"] == MIXED
    # the final validation fused a copy of best.pt, and its metrics are there
    assert yolo.metrics is not None


ELSEWHERE = """
import sys
from ultralytics import YOLO
model = YOLO(sys.argv[1])
assert "rep_backbones" in sys.modules
assert not model.model.is_fused()
model.fuse()
assert not any(type(module).__name__ == "Parallel" for module in model.model.modules())
"""


def test_a_checkpoint_loads_and_fuses_without_an_import(tmp_path):
    torch.save({"model": detector(), "train_args": {"task": "detect"}}, tmp_path / "best.pt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "best.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(tasks, "_SafeLoad"), reason="this release has no restricted loading")
def test_a_checkpoint_loads_in_the_restricted_way(tmp_path):
    model = detector()
    torch.save({"model": model, "train_args": {"task": "detect"}}, tmp_path / "best.pt")
    again = tasks.torch_safe_load(tmp_path / "best.pt", safe_only=True)[0]["model"]
    assert torch.equal(outputs(again), outputs(model))


# ---- deploy models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", sorted(STOCK, key=lambda cls: cls.__name__))
def test_each_container_has_a_stock_module_that_computes_the_same(container):
    torch.manual_seed(0)
    conv, other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
    made = {
        containers.Residual: lambda: containers.Residual(conv, containers.Scale(6)),
        containers.Concat: lambda: containers.Concat([conv, other, nn.Identity()]),
        containers.Split: lambda: containers.Split(nn.Conv2d(3, 5, 3, padding=1)),
        containers.PoolPyramid: lambda: containers.PoolPyramid(5),
        containers.Gate: lambda: containers.Gate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())),
        containers.Scale: lambda: containers.Scale(6, per_channel=True),
    }[container]().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 9, 7)
    plain = to_stock(made)
    assert torch.allclose(plain(x), made(x), rtol=0, atol=1e-6)
    assert not any(type(module).__module__.startswith("rep_backbones") for module in plain.modules())
    assert type(made) is container, "the model that was given stays as it was"


def test_to_stock_refuses_branches():
    with pytest.raises(ValueError, match=r"no stock form for .*fuse the model first"):
        to_stock(detector().eval())


ALONE = """
import json, sys
import numpy as np, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rep_backbones":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from ultralytics import YOLO, __version__
from ultralytics.nn import tasks
model = YOLO(sys.argv[1])
x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
found = {"version": __version__}
with torch.no_grad():
    np.save(sys.argv[2], model.model.eval()(x)[0].numpy())
    if hasattr(tasks, "_SafeLoad"):
        restricted = tasks.torch_safe_load(sys.argv[1], safe_only=True)[0]["model"].float().eval()
        found["restricted"] = float((restricted(x)[0] - model.model(x)[0]).abs().max())
result = model.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, conf=0.001, verbose=False)
found["boxes"] = len(result[0].boxes)
print(json.dumps(found))
"""


def test_a_deploy_checkpoint_needs_stock_ultralytics_only(tmp_path):
    """Set REP_TEST_ULTRALYTICS to folders (os.pathsep between them) of other Ultralytics releases to load it there too."""
    model = detector().eval()
    expected = outputs(model)
    deploy = to_stock(rep_backbones.fuse(model))
    assert_same(expected, outputs(deploy))
    file = tmp_path / "deploy.pt"
    torch.save({"model": deploy, "train_args": {"task": "detect"}}, file)
    assert b"rep_backbones" not in file.read_bytes()
    (tmp_path / "alone.py").write_text(ALONE)
    for release in ["", *filter(None, os.environ.get("REP_TEST_ULTRALYTICS", "").split(os.pathsep))]:
        env = {**os.environ, **({"PYTHONPATH": release} if release else {}), "ULTRALYTICS_SAFE_LOAD": "1"}
        command = [sys.executable, str(tmp_path / "alone.py"), str(file), str(tmp_path / "out.npy")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found.get("restricted", 0) == 0
        assert_same(expected, torch.from_numpy(np.load(tmp_path / "out.npy")))

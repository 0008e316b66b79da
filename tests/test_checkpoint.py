"""Good checkpoints: the safe loader gives, bit for bit, the model that unpickling gives."""

from __future__ import annotations

import copy
import hashlib
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
import ultralytics
from checkpoint_helpers import built, contents, outputs, plainly, same, saved, tiny_yaml
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils.torch_utils import strip_optimizer

from rep_backbones import fuse, register_layer
from rep_backbones.registry import LAYERS
from rep_backbones.yolo import checkpoint
from rep_backbones.yolo.stock import to_stock

STOCK = [
    ("yolov8n.yaml", "detect"),
    ("yolo11n.yaml", "detect"),
    ("yolo26n.yaml", "detect"),
    ("yolov10n.yaml", "detect"),
    ("yolo11n-seg.yaml", "segment"),
    ("yolo11n-pose.yaml", "pose"),
    ("yolo11n-obb.yaml", "obb"),
    ("yolo11n-cls.yaml", "classify"),
]


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    return built(tiny_yaml())


@pytest.fixture(scope="session")
def tiny_file(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny") / "best.pt", tiny)


@pytest.mark.parametrize(("name", "task"), STOCK)
def test_stock_models_put_out_the_same_bits(name: str, task: str, tmp_path: Path) -> None:
    try:
        model = built(name, task)
    except FileNotFoundError:
        pytest.skip(f"Ultralytics {ultralytics.__version__} has no {name}")
    outputs(model)  # a model that has run holds anchors and shapes
    file = saved(tmp_path / "best.pt", model)
    loaded, original = checkpoint.load(file), plainly(file)
    assert same(outputs(loaded.model), outputs(original))
    assert same(list(loaded.model.state_dict().values()), list(original.state_dict().values()))
    assert loaded.task == task and loaded.dtype == torch.float16
    assert type(loaded.model) is type(original) and str(loaded.model) == str(original)


def test_the_fields_say_what_the_file_says(tiny: nn.Module, tiny_file: Path) -> None:
    loaded = checkpoint.load(tiny_file)
    assert loaded.path == tiny_file and loaded.digest == hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    assert loaded.names == {0: "class 0", 1: "class 1"} == loaded.model.names
    assert loaded.stride.tolist() == [4.0, 8.0] == loaded.model.stride.tolist()
    assert loaded.args["imgsz"] == 64 == loaded.model.args["imgsz"]
    assert (loaded.epoch, loaded.date, loaded.version) == (3, "2026-01-02T03:04:05", ultralytics.__version__)
    assert loaded.yaml["head"] == tiny_yaml()["head"] and loaded.model.yaml == loaded.yaml
    assert loaded.model.pt_path == str(tiny_file) and loaded.model.task == "detect"
    assert not loaded.precise and loaded.note == ""


def test_every_attribute_of_every_layer_is_the_original(tiny: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny)
    model.model[0].bn.eps, model.model[1].bn.momentum, model.model[-1].max_det, model.inplace = 2e-3, 0.25, 17, False
    model.model[1].act.inplace = False
    file = saved(tmp_path / "best.pt", model)
    loaded, original = checkpoint.load(file).model, plainly(file)
    skipped = {"args", "pt_path", "yaml"}
    for (path, ours), (other, theirs) in zip(loaded.named_modules(), original.named_modules()):
        assert path == other and type(ours) is type(theirs)
        mine, its = ({k: v for k, v in vars(m).items() if k not in skipped} for m in (ours, theirs))
        assert mine.keys() - {"pt_path"} == its.keys(), path
        for name, value in its.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine[name], value.float()), (path, name)
            elif not name.startswith("_"):
                assert mine[name] == value, (path, name)


def test_the_model_is_in_eval_mode_and_frozen_as_in_the_file(tiny_file: Path) -> None:
    loaded = checkpoint.load(tiny_file).model
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in loaded.parameters())


def test_the_ema_is_taken_before_the_model(tiny: nn.Module, tmp_path: Path) -> None:
    other = built(tiny_yaml(), seed=1)
    file = saved(tmp_path / "last.pt", tiny, model=copy.deepcopy(other).half())
    assert same(outputs(checkpoint.load(file).model), outputs(plainly(file)))
    only_model = saved(tmp_path / "model.pt", tiny, model=copy.deepcopy(other).half(), ema=None)
    assert same(outputs(checkpoint.load(only_model).model), outputs(copy.deepcopy(other).half().float()))


def test_a_file_that_training_has_finished_with(tiny_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.pt"
    file.write_bytes(tiny_file.read_bytes())
    strip_optimizer(file)
    assert checkpoint.load(file).epoch == -1
    assert same(outputs(checkpoint.load(file).model), outputs(plainly(file)))


def test_a_file_with_optimizer_numpy_scalars_paths_and_losses(tiny: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny)
    model.criterion = model.init_criterion()
    buffers = {index: {"momentum_buffer": torch.ones_like(p)} for index, p in enumerate(model.parameters())}
    optimizer = {"state": buffers, "param_groups": [{"lr": 0.1, "nesterov": True, "params": list(buffers)}]}
    metrics = {"fitness": np.float64(0.25), "epochs": np.int64(3), "path": pathlib.PurePosixPath("runs/train")}
    entries = {"optimizer": optimizer, "train_metrics": metrics, "best_fitness": np.float32(0.5)}
    file = saved(tmp_path / "last.pt", model, train_args={"project": pathlib.Path("runs"), "imgsz": 64}, **entries)
    loaded = checkpoint.load(file)
    assert same(outputs(loaded.model), outputs(plainly(file)))
    assert str(loaded.args["project"]) == "runs" and not hasattr(loaded.model, "criterion")


def test_a_classifier_with_picture_transforms(tmp_path: Path) -> None:
    from ultralytics.data.augment import classify_transforms

    model = built(
        {"nc": 5, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]], "depth_multiple": 1.0},
        "classify",
    )
    model.transforms = classify_transforms(64)
    loaded = checkpoint.load(saved(tmp_path / "best.pt", model))
    assert same(outputs(loaded.model), outputs(plainly(tmp_path / "best.pt"))) and not hasattr(loaded.model, "transforms")


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolov10n.yaml", "yolov6n.yaml", "yolov9t.yaml"])
def test_a_model_that_ultralytics_has_fused(name: str, tmp_path: Path) -> None:
    model = built(name).fuse(verbose=False)
    file = saved(tmp_path / "fused.pt", model)
    loaded = checkpoint.load(file).model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    assert same(outputs(loaded), outputs(plainly(file)))


def test_a_deploy_file_whose_layers_are_plain_convolutions(tiny: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny)
    for index in (0, 1, 3):
        layer = model.model[index]
        conv = nn.Conv2d(layer.conv.in_channels, layer.conv.out_channels, 3, 2, 1)
        merged = nn.Sequential(conv, nn.ReLU())
        for name in ("i", "f", "type", "np"):
            merged.__dict__[name] = layer.__dict__[name]
        model.model[index] = merged
    file = tmp_path / "best_deploy.pt"
    torch.save(contents(model, ema=model.eval()), file)
    loaded = checkpoint.load(file)
    assert loaded.dtype == torch.float32 and type(loaded.model.model[0]) is nn.Sequential
    assert same(outputs(loaded.model), outputs(plainly(file)))


def test_a_layer_that_is_used_twice_stays_one_layer(tiny: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny)
    model.model[0].act = model.model[1].act = nn.Hardswish()
    loaded = checkpoint.load(saved(tmp_path / "best.pt", model)).model
    assert loaded.model[0].act is loaded.model[1].act and type(loaded.model[0].act) is nn.Hardswish
    assert loaded.model[3].act is not Conv.default_act  # or a file could change what later models are built with


def test_an_activation_in_the_yaml_is_built_and_does_not_stay(tmp_path: Path) -> None:
    before = Conv.default_act
    model = built({**tiny_yaml(), "activation": "nn.LeakyReLU(0.2)"})
    Conv.default_act = before
    loaded = checkpoint.load(saved(tmp_path / "best.pt", model)).model
    assert Conv.default_act is before
    assert loaded.model[0].act.negative_slope == 0.2 and same(outputs(loaded), outputs(plainly(tmp_path / "best.pt")))


def test_strides_of_weights_are_kept(tiny: nn.Module, tmp_path: Path) -> None:
    file = saved(tmp_path / "best.pt", copy.deepcopy(tiny).to(memory_format=torch.channels_last))
    ours, theirs = checkpoint.load(file).model, plainly(file)
    assert ours.model[1].conv.weight.stride() == theirs.model[1].conv.weight.stride()


def test_loading_leaves_random_numbers_alone(tiny_file: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    checkpoint.load(tiny_file)
    assert torch.equal(before, torch.get_rng_state())


def test_a_data_file_on_the_network_is_forgotten(tiny: nn.Module, tmp_path: Path) -> None:
    file = saved(tmp_path / "best.pt", tiny, train_args={"data": "https://example.org/evil.yaml", "imgsz": 64})
    loaded = checkpoint.load(file)
    assert "data" not in loaded.args and loaded.model.args["data"] is None


def test_check_passes_what_load_loads(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "rebuild", None)  # it must not build
    checkpoint.check(tiny_file)


# ---------------------------------------------------------------------------------------------------- registered layers
def with_row(name: str) -> nn.Module:
    """The tiny detector with one row of a registered layer, twice or with two repeats inside."""
    config = tiny_yaml()
    config["backbone"][1:1] = [[-1, 2, name, [8]]]
    config["head"][-1][0] = [3, 4]
    return built(config)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_registered_layer_as_trained_and_as_deployed(name: str, tmp_path: Path) -> None:
    model = with_row(name)
    file = saved(tmp_path / "best.pt", model)
    loaded = checkpoint.load(file).model
    assert same(outputs(loaded), outputs(plainly(file)))
    deploy = to_stock(fuse(loaded))
    torch.save(contents(model, ema=deploy), tmp_path / "best_deploy.pt")
    again = checkpoint.load(tmp_path / "best_deploy.pt")
    assert again.dtype == torch.float32 and same(outputs(again.model), outputs(deploy))
    assert not any(type(module).__module__.startswith("rep_backbones") for module in again.model.modules())


class Inner(nn.Module):
    """A part of the layer below, which is not registered itself."""

    def __init__(self, c: int, rates: list[float]) -> None:
        super().__init__()
        self.conv, self.rates = nn.Conv2d(c, c, 1), rates
        self.register_buffer("offset", torch.rand(c, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.offset


class UsersLayer(nn.Module):
    """A layer that computes with numbers while it is built, as drop path rates are."""

    def __init__(self, c1: int, c2: int, mode: str = "plain") -> None:
        super().__init__()
        self.inner, self.mode = Inner(c1, torch.linspace(0, 0.1, 3).tolist()), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_layer_of_the_user_loads_where_it_is_registered(tmp_path: Path) -> None:
    register_layer(UsersLayer)
    try:
        config = tiny_yaml()
        config["backbone"][1:1] = [[-1, 1, "UsersLayer", [8, "fancy"]]]
        config["head"][-1][0] = [3, 4]
        file = saved(tmp_path / "best.pt", built(config))
        loaded = checkpoint.load(file).model
        assert same(outputs(loaded), outputs(plainly(file))) and loaded.model[1].mode == "fancy"
    finally:
        LAYERS.pop("UsersLayer")
    with pytest.raises(checkpoint.Refused, match="UsersLayer.*register_layer"):
        checkpoint.load(file)


# ------------------------------------------------------------------------------------------------------------- precision
@pytest.fixture(params=["infinity", "the largest number"])
def pair(request: pytest.FixtureRequest, tiny: nn.Module, tmp_path: Path) -> tuple[Path, Path]:
    """best.pt, and best_fp32.pt beside it; what overflows FP16 is stored as by Ultralytics 8.3, and as by 8.4."""
    sharp = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in sharp.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) * 1e-4)
        sharp.model[0].bn.running_var[0] = 1e6  # overflows FP16
    content = contents(sharp)
    if request.param == "the largest number":
        torch.nan_to_num_(content["ema"].model[0].bn.running_var)
    file = tmp_path / "best.pt"
    torch.save(content, file)
    state = {key: value.clone() for key, value in sharp.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "best_fp32.pt")
    return file, tmp_path / "best_fp32.pt"


def test_precise_weights_beside_the_file_are_taken(pair: tuple[Path, Path]) -> None:
    precise, rounded = checkpoint.load_precise(pair[0]), checkpoint.load(pair[0])
    stored = torch.load(pair[1], weights_only=True)["state_dict"]
    assert precise.precise and precise.note == "" and not rounded.precise
    assert all(torch.equal(value, stored[key]) for key, value in precise.model.state_dict().items())
    assert not torch.equal(precise.model.model[1].conv.weight, rounded.model.model[1].conv.weight)


def test_without_precise_weights_the_file_itself_is_taken(tiny_file: Path) -> None:
    loaded = checkpoint.load_precise(tiny_file)
    assert not loaded.precise and loaded.note == ""


@pytest.mark.parametrize("spoil", ["one weight", "a missing key", "a shape", "garbage", "a model"])
def test_precise_weights_of_something_else_are_ignored(pair: tuple[Path, Path], spoil: str, tiny: nn.Module) -> None:
    file, beside = pair
    content = torch.load(beside, weights_only=True)
    key = "model.1.conv.weight"
    if spoil == "one weight":
        content["state_dict"][key][0, 0, 0, 0] += 0.1
    elif spoil == "a missing key":
        del content["state_dict"][key]
    elif spoil == "a shape":
        content["state_dict"][key] = content["state_dict"][key][:1]
    torch.save(contents(tiny) if spoil == "a model" else content, beside)
    if spoil == "garbage":
        beside.write_bytes(b"PK garbage")
    loaded = checkpoint.load_precise(file)
    assert not loaded.precise and "best_fp32.pt" in loaded.note
    assert same(outputs(loaded.model), outputs(checkpoint.load(file).model))


# ----------------------------------------------------------------------------------------------------------------- trust
def test_a_trusted_file_is_unpickled(tiny_file: Path) -> None:
    loaded = checkpoint.load(tiny_file, trust=True)
    assert same(outputs(loaded.model), outputs(plainly(tiny_file)))
    assert loaded.dtype == torch.float16 and loaded.epoch == 3 and loaded.digest == checkpoint.load(tiny_file).digest


def test_trust_loads_a_layer_that_the_yaml_does_not_have(tiny: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny)
    model.model[0].conv = nn.Conv2d(3, 12, 3, 2, 1, bias=False)  # pruned by hand, say
    model.model[0].bn = nn.BatchNorm2d(12)
    model.model[1].conv = nn.Conv2d(12, 16, 3, 2, 1, bias=False)
    file = saved(tmp_path / "pruned.pt", model)
    reason = r"shape \(12, 3, 3, 3\) for \(8, 3, 3, 3\) at model.0.conv.weight.*--trust"
    with pytest.raises(checkpoint.Refused, match=reason):
        checkpoint.load(file)
    assert same(outputs(checkpoint.load(file, trust=True).model), outputs(plainly(file)))

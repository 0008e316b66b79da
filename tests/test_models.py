"""Every model YAML of this package builds by name, at every scale, with the published numbers of parameters."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn import tasks
from yolo_helpers import randomize_norms

import rep_backbones
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import names, rows

# YOLOv6 v3.0, counted from the authors' own code in training form: backbone (with its pooling pyramid), neck
YOLOV6 = {
    "efficientrep-n.yaml": (3_435_296, 1_193_952),
    "efficientrep-s.yaml": (13_712_960, 4_759_488),
    "efficientrep-m.yaml": (25_716_780, 8_243_052),
    "efficientrep-l.yaml": (38_472_533, 14_490_520),
}
PACKAGED = names.packaged()
BUILT = [*YOLOV6, "efficientrep-qa-n.yaml", "yolo11n-repconv.yaml"]


def on_paper(name):
    """The layers of a model without their numbers: shapes cost nothing."""
    with torch.device("meta"):
        return tasks.parse_model(deepcopy(tasks.yaml_model_load(name)), ch=3, verbose=False)[0]


def test_the_four_sizes_are_there():
    assert set(YOLOV6) <= set(PACKAGED)


@pytest.mark.parametrize("name", YOLOV6)
def test_parameters_are_those_published(name):
    config = tasks.yaml_model_load(name)
    layers = on_paper(name)
    trunk = len(config["backbone"])
    counts = [sum(p.numel() for layer in part for p in layer.parameters()) for part in (layers[:trunk], layers[trunk:-1])]
    assert tuple(counts) == YOLOV6[name]


@pytest.mark.parametrize("name", PACKAGED)
def test_every_name_parses_at_its_scale(name):
    layers = on_paper(name)
    config = tasks.yaml_model_load(name)
    assert config["scale"] in config["scales"] and config["yaml_file"] == name
    assert rows.names_a_layer(config)
    if name != "efficientrep-l.yaml":  # this size trains without branches
        assert multi_branch(layers)
    assert type(layers[-1]).__name__ == "Detect" and layers[-1].legacy is False


def test_scales_differ():
    sizes = {name: sum(p.numel() for p in on_paper(name).parameters()) for name in PACKAGED}
    assert len(set(sizes.values())) == len(sizes)


def test_every_file_is_built_here():
    built = {names.find(name.replace("yolo11n", "yolo11")).file for name in BUILT}
    assert built == {names.find(name).file for name in PACKAGED}


@pytest.mark.parametrize("name", BUILT)
def test_models_build_by_name(name, monkeypatch):
    # what the numbers are is of no account here, and drawing 60 million of them takes seconds
    monkeypatch.setattr(torch.nn.modules.conv._ConvNd, "reset_parameters", lambda self: None)
    model = YOLO(name).model
    assert [int(stride) for stride in model.stride] == [8, 16, 32]
    assert model.yaml["yaml_file"] == name and model.training


@pytest.mark.parametrize("name", BUILT)
def test_every_file_fuses_to_one_convolution_each(name):
    torch.manual_seed(0)
    config = tasks.yaml_model_load(name)
    config["scales"][config["scale"]] = [0.33, 0.125, 1024]  # the same rows, narrow
    model = randomize_norms(tasks.DetectionModel(config, verbose=False)).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, fused = model(x)[0], rep_backbones.fuse(model)
        after = fused(x)[0]
    for part in (slice(0, 4), slice(4, None)):
        assert (before[:, part] - after[:, part]).abs().max() <= 1e-5 * before[:, part].abs().max()
    assert not multi_branch(fused) and (name == "efficientrep-l.yaml" or multi_branch(model))


def test_yolov6s_own_choices():
    small, medium, large = (on_paper(f"efficientrep-{letter}.yaml") for letter in "sml")
    acts = [
        {type(m).__name__ for m in layers[:-1].modules() if type(m).__module__.endswith(".activation")}
        for layers in (small, medium, large)
    ]
    assert acts == [{"ReLU"}, {"ReLU"}, {"ReLU", "SiLU"}]
    assert type(small[9]).__name__ == "SimCSPSPPF" and type(medium[9]).__name__ == "SimSPPF"
    in_pyramid = {type(m).__name__ for m in large[9].modules() if type(m).__module__.endswith(".activation")}
    assert in_pyramid == {"SiLU"}


def test_the_example_differs_from_yolo11_in_one_row():
    ours, theirs = (tasks.yaml_model_load(name) for name in ("yolo11-repconv.yaml", "yolo11.yaml"))
    rows_of = [[row[:4] for row in config["backbone"] + config["head"]] for config in (ours, theirs)]
    different = [(a, b) for a, b in zip(*rows_of, strict=True) if a != b]
    assert len(different) == 1 and different[0][0][2] == "RepConv" and different[0][1][2] == "Conv"
    assert different[0][0][3] == different[0][1][3] and ours["scales"] == theirs["scales"]


# ---- by name ------------------------------------------------------------------------------------------------------------


def test_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    text = names.find("efficientrep.yaml").file.read_text()
    monkeypatch.chdir(tmp_path)
    Path("efficientrep.yaml").write_text(text.replace("n: [0.33, 0.25, 1024]", "n: [0.33, 0.125, 1024]"))
    assert tasks.yaml_model_load("efficientrep-n.yaml")["scales"]["n"][1] == 0.125
    Path("efficientrep-n.yaml").write_text(text.replace("n: [0.33, 0.25, 1024]", "n: [0.33, 0.0625, 1024]"))
    assert tasks.yaml_model_load("efficientrep-n.yaml")["scales"]["n"][1] == 0.0625
    assert tasks.yaml_model_load("efficientrep-m.yaml")["scale"] == "m"


def test_scales_of_the_users_own_files(tmp_path):
    rows_of_it = "backbone: [[-1, 1, RepConv, [64]]]\nhead: [[[0], 1, Detect, [nc]]]\n"
    config = "nc: 1\nscales: {a0: [1.0, 0.25, 64], a1: [1.0, 0.5, 64]}\n" + rows_of_it
    (tmp_path / "mine.yaml").write_text(config)
    assert tasks.yaml_model_load(tmp_path / "mine-a1.yaml")["scale"] == "a1"
    assert YOLO(tmp_path / "mine-a1.yaml").model.model[0].np > YOLO(tmp_path / "mine-a0.yaml").model.model[0].np
    (tmp_path / "other.yaml").write_text("scale: a1\n" + config)
    assert tasks.yaml_model_load(tmp_path / "other.yaml")["scale"] == "a1"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tasks.yaml_model_load(tmp_path / "mine-a2.yaml")


def test_a_wrong_name_lists_near_ones():
    with pytest.raises(FileNotFoundError, match=r"'eficientrep-n.yaml' does not exist. Did you mean efficientrep-n.yaml"):
        YOLO("eficientrep-n.yaml")


def test_upstreams_names_stay_upstreams():
    assert tasks.guess_model_scale("yolo11s-seg.yaml") == "s"
    assert tasks.guess_model_scale("efficientrep.yaml") == ""
    assert Path(tasks.check_yaml("yolo11.yaml")).parts[-5:-1] == ("ultralytics", "cfg", "models", "11")

"""Every model YAML of this package builds by name, at every scale, with the published numbers of parameters."""

from copy import deepcopy
from functools import cache
from io import BytesIO
from pathlib import Path

import onnx
import pytest
import torch
import ultralytics
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks
from ultralytics.nn.modules import C3
from yolo_helpers import narrow, noise, randomize_norms

import rep_backbones
from rep_backbones import list_backbones
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import expanding, names, reading
from rep_backbones.yolo.proof import exported_form, named
from rep_backbones.yolo.stock import to_stock

# YOLOv6 v3.0, counted from the authors' own code in training form: backbone (with its pooling pyramid), neck
YOLOV6 = {
    "efficientrep-n.yaml": (3_435_296, 1_193_952),
    "efficientrep-s.yaml": (13_712_960, 4_759_488),
    "efficientrep-m.yaml": (25_716_780, 8_243_052),
    "efficientrep-l.yaml": (38_472_533, 14_490_520),
}
# of the same for 1280 pixels: width, bins of the authors' head for each side of a box, and published millions of parameters
YOLOV6_P6 = {
    "efficientrep6-n.yaml": (0.25, 0, 10.4),
    "efficientrep6-s.yaml": (0.5, 0, 41.4),
    "efficientrep6-m.yaml": (0.75, 16, 79.6),
    "efficientrep6-l.yaml": (1.0, 16, 140.4),
}
# YOLOv7, likewise: all rows before the head
YOLOV7 = {"yolov7-tiny.yaml": 5_997_856, "yolov7.yaml": 37_162_400, "yolov7x.yaml": 70_772_424}
# torchvision's ResNets without their linear layer, the plain one without the three projections of ResNet-34 too; the
# trunk of YOLOv5-l without its pooling pyramid; two factors for each of 16 or 21 residual blocks
LINEAGE = {
    "plain34-l.yaml": 21_284_672 - 173_824,
    "resnet34-l.yaml": 21_284_672,
    "resnet50-l.yaml": 23_508_032,
    "resnet50-weighted-l.yaml": 23_508_032 + 32,
    "cspdarknet-l.yaml": 23_958_400,
    "cspdarknet-weighted-l.yaml": 23_958_400 + 42,
}
# networks that train without branches
PLAIN = {
    "efficientrep-l",
    "efficientrep6-l",
    "yolov7-tiny",
    "yolov7x",
    "plain34",
    "resnet34",
    "resnet50",
    "resnet50-weighted",
}
OF_LINEAGE = ("plain34", "plain34-repvgg", "resnet34", "resnet50", "resnet50-weighted", "cspdarknet", "cspdarknet-weighted")
HAS_YOLO26 = (Path(ultralytics.__file__).parent / "cfg" / "models" / "26").is_dir()
PACKAGED = [name for name in names.packaged() if HAS_YOLO26 or not name.startswith("yolo26")]
BUILT = [
    *YOLOV6,
    *YOLOV6_P6,
    *YOLOV7,
    *(f"{stem}-n.yaml" for stem in OF_LINEAGE),
    "efficientrep-qa-n.yaml",
    "repvgg-a0.yaml",
    "repvgg-a0-cls.yaml",
    "mobileone-s0.yaml",
    "yolo11n-repconv.yaml",
    "yolo11n-expand.yaml",
    *(["yolo26n-expand.yaml"] if HAS_YOLO26 else []),
]


def on_paper(name):
    """The layers of a model without their numbers: shapes cost nothing."""
    with torch.device("meta"):
        return tasks.parse_model(deepcopy(tasks.yaml_model_load(name)), ch=3, verbose=False)[0]


@cache
def numbers_on_paper(name):
    """All parameters, layers with branches, parameters of the first row, and convolutions that merging takes away; a model
    that is kept slows down every test after it.
    """
    layers = on_paper(name)
    head = layers[-1]
    assert type(head).__name__ == ("Classify" if name.endswith("-cls.yaml") else "Detect")
    assert getattr(head, "legacy", False) is False
    merged = [part for _, _, part in multi_branch(layers)]
    fewer = sum(sum(isinstance(module, nn.Conv2d) for module in part.modules()) - 1 for part in merged)
    return numbers([layers]), len(merged), numbers(layers[:1]), fewer


def is_plain(name):
    return names.find(name) is not None and names.find(name).file.stem in PLAIN


def convs_and_norms(*modules):
    return [part for module in modules for part in module.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))]


def numbers(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_four_sizes_are_there():
    assert set(YOLOV6) <= set(PACKAGED)


@pytest.mark.parametrize("name", YOLOV6)
def test_parameters_are_those_published(name):
    config = tasks.yaml_model_load(name)
    layers = on_paper(name)
    trunk = len(config["backbone"])
    assert (numbers(layers[:trunk]), numbers(layers[trunk:-1])) == YOLOV6[name]


@pytest.mark.parametrize(
    "name", [*list(YOLOV6_P6)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(YOLOV6_P6)[2:])]
)
def test_deployed_with_the_authors_head_it_has_the_published_parameters(name):
    width, bins, published = YOLOV6_P6[name]
    layers = tasks.parse_model(deepcopy(tasks.yaml_model_load(name)), ch=3, verbose=False)[0]
    total = numbers(rep_backbones.fuse(layers[:-1].eval()))
    for c in (int(c * width) for c in (128, 256, 512, 1024)):  # a 1x1, two 3x3, and the 1x1 of 80 classes and of four sides
        total += (c + 1) * c + 2 * (9 * c + 1) * c + (c + 1) * (80 + 4 * (bins + 1))
    assert round(total / 1e6, 1) == published


@pytest.mark.parametrize("name", YOLOV7)
def test_parameters_of_yolov7_are_those_published(name):
    assert numbers(on_paper(name)[:-1]) == YOLOV7[name]


@pytest.mark.parametrize("name", LINEAGE)
def test_parameters_of_the_lineage_are_those_known(name):
    assert numbers(on_paper(name)[: len(tasks.yaml_model_load(name)["backbone"])]) == LINEAGE[name]


TRUNK_NAMES = [name for name in PACKAGED if name.startswith(("repvgg-", "mobileone-"))]


def test_every_variant_has_its_name():
    known = [*list_backbones("repvgg_*"), *list_backbones("mobileone_*")]
    detectors = {name.replace("_", "-") + ".yaml" for name in known}
    assert set(TRUNK_NAMES) == detectors | {f"{name.replace('_', '-')}-cls.yaml" for name in list_backbones("repvgg_*")}


@pytest.mark.parametrize("name", TRUNK_NAMES)
def test_trunks_are_the_published_ones(name):
    with torch.device("meta"):
        backbone = rep_backbones.create_backbone(name.removesuffix(".yaml").removesuffix("-cls").replace("-", "_"), 0)
    assert numbers_on_paper(name)[2] == numbers([backbone])


@pytest.mark.parametrize("name", PACKAGED)
def test_every_name_parses_at_its_scale(name):
    config = tasks.yaml_model_load(name)
    assert config["yaml_file"] == name and ("scales" not in config or config["scale"] in config["scales"])
    assert reading.names_a_layer(config) or expanding.requests(config)
    assert is_plain(name) != bool(numbers_on_paper(name)[1])


def test_scales_differ():
    sizes = {name: numbers_on_paper(name)[0] for name in PACKAGED}
    assert len(set(sizes.values())) == len(sizes)


def test_every_file_is_built_here():
    built = {names.find(name.replace("o11n-", "o11-").replace("o26n-", "o26-")).file for name in BUILT}
    assert built == {names.find(name).file for name in PACKAGED}


@pytest.mark.parametrize("name", BUILT)
def test_models_build_by_name(name, monkeypatch):
    # what the numbers are is of no account here, and drawing 60 million of them takes seconds
    monkeypatch.setattr(torch.nn.modules.conv._ConvNd, "reset_parameters", lambda self: None)
    model = YOLO(name).model
    strides = [8, 16, 32, 64][: 4 if name in YOLOV6_P6 else 3]
    assert model.task == "classify" or [int(stride) for stride in model.stride] == strides
    assert model.yaml["yaml_file"] == name and model.training


@pytest.mark.parametrize("name", BUILT)
def test_every_file_trains_a_step_and_fuses_to_one_convolution_each(name):
    model, x = narrow(name), noise()
    model.args = get_cfg()
    objects = {"cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.5), "batch_idx": torch.arange(2.0)}
    if model.task == "classify":
        objects = {"cls": torch.zeros(2, dtype=torch.long)}
    model.loss({"img": x, **objects})[0].sum().backward()
    trained = {path: p.grad for path, p in model.named_parameters() if p.requires_grad}
    assert not [path for path, grad in trained.items() if grad is None or not grad.isfinite().all()]
    randomize_norms(model).eval()
    with torch.no_grad():
        before, fused = named(model(x), model), rep_backbones.fuse(model)
        after = named(fused(x), fused)
    assert before.keys() == after.keys()
    for part, value in before.items():
        assert (value - after[part]).abs().max() <= 1e-5 * value.abs().max(), part
    assert is_plain(name.replace("1n-", "1-")) != bool(multi_branch(model)) and not multi_branch(fused)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_every_file_exports(name):
    deployed = exported_form(to_stock(rep_backbones.fuse(narrow(name).eval())))
    file = BytesIO()
    torch.onnx.export(deployed, (noise(1),), file, dynamo=False, opset_version=18)
    nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert 0 < nodes.count("Conv") <= sum(isinstance(module, nn.Conv2d) for module in deployed.modules())


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


def test_yolov7s_own_choices():
    tiny, seven, large = (on_paper(name) for name in YOLOV7)
    acts = [
        {repr(m) for m in layers[:-1].modules() if type(m).__module__.endswith(".activation")}
        for layers in (tiny, seven, large)
    ]
    assert {act.split("(")[0] for act in acts[1] | acts[2]} == {"SiLU"}
    assert acts[0] == {"LeakyReLU(negative_slope=0.1)"}
    last = [[type(layer).__name__ for layer in layers[-4:-1]] for layers in (tiny, seven, large)]
    assert last == [["ConvBNAct"] * 3, ["RepConv"] * 3, ["Conv"] * 3]
    assert not any("identity" in path for path, _ in seven.named_modules())


def test_the_lineage_has_one_neck():
    necks = [tasks.yaml_model_load(f"{stem}-n.yaml")["head"] for stem in OF_LINEAGE]
    assert all([row[1:] for row in neck] == [row[1:] for neck in necks[:1] for row in neck] for neck in necks)
    assert tasks.yaml_model_load("resnet50.yaml")["scale"] == "l"


def test_resnet50_computes_what_torchvisions_does():
    config = {**tasks.yaml_model_load("resnet50.yaml"), "scales": {"l": [0.33, 1.0, 2048]}}
    ours = tasks.parse_model(config, ch=3, verbose=False)[0][:6].eval()
    theirs = randomize_norms(ResNet(Bottleneck, [1, 1, 2, 1])).eval()
    theirs.avgpool = theirs.fc = nn.Identity()
    with torch.no_grad():
        for mine, given in zip(convs_and_norms(ours), convs_and_norms(theirs), strict=True):
            mine.load_state_dict(given.state_dict())
        expected = theirs(noise(1))
        assert (ours(noise(1)).flatten(1) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_cspdarknet_computes_what_yolov5s_trunk_does():
    configs = [tasks.yaml_model_load(name) for name in ("cspdarknet-n.yaml", "yolov5n.yaml")]
    ours, theirs = (tasks.parse_model(deepcopy(config), ch=3, verbose=False)[0][:9].eval() for config in configs)
    randomize_norms(theirs)
    parts = [[row.cv1, row.cv2, row.m, row.cv3] if isinstance(row, C3) else [row] for row in theirs]
    with torch.no_grad():
        for mine, given in zip(convs_and_norms(ours), convs_and_norms(*sum(parts, [])), strict=True):
            mine.load_state_dict(given.state_dict())
        expected = theirs(noise(1))
        assert (ours(noise(1)) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_plain_networks_with_branches_deploy_to_the_plain_ones():
    fused = [rep_backbones.fuse(narrow(f"{stem}-n.yaml").eval()) for stem in ("plain34", "plain34-repvgg")]
    shapes = [[(m.weight.shape, m.stride) for m in model.modules() if isinstance(m, nn.Conv2d)] for model in fused]
    assert shapes[0] == shapes[1]


def rows_of(name):
    config = tasks.yaml_model_load(name)
    return [row[:4] for row in config["backbone"] + config["head"]]


def test_the_example_differs_from_yolo11_in_one_row():
    different = [(a, b) for a, b in zip(rows_of("yolo11-repconv.yaml"), rows_of("yolo11.yaml"), strict=True) if a != b]
    assert len(different) == 1 and different[0][0][2] == "RepConv" and different[0][1][2] == "Conv"
    assert different[0][0][3] == different[0][1][3]
    assert tasks.yaml_model_load("yolo11-repconv.yaml")["scales"] == tasks.yaml_model_load("yolo11.yaml")["scales"]


@pytest.mark.parametrize("stem", ["yolo11", *(["yolo26"] if HAS_YOLO26 else [])])
def test_expanded_networks_are_the_stock_ones(stem):
    ours, theirs = (tasks.yaml_model_load(f"{stem}{end}.yaml") for end in ("-expand", ""))
    assert rows_of(f"{stem}-expand.yaml") == rows_of(f"{stem}.yaml") and ours["expand"] == "DiverseBranchBlock"
    same = theirs.keys() - {"backbone", "head", "yaml_file"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


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

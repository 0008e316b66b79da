"""The published networks: numbers of parameters in both forms, shapes, fused the same, trained, in a detector."""

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from yolo_helpers import noise, randomize_norms

from rep_backbones import create_backbone, fuse, list_backbones
from rep_backbones.rules import multi_branch

# with 1000 classes, counted from the authors' own code: in training, deployed
PARAMETERS = {
    "repvgg_a0": (9_108_968, 8_309_384),
    "repvgg_a1": (14_092_264, 12_789_864),
    "repvgg_a2": (28_210_600, 25_499_944),
    "repvgg_b0": (15_817_960, 14_339_048),
    "repvgg_b1": (57_415_016, 51_829_480),
    "repvgg_b1g2": (45_782_376, 41_360_104),
    "repvgg_b1g4": (39_966_056, 36_125_416),
    "repvgg_b2": (89_022_376, 80_315_112),
    "repvgg_b2g2": (70_846_376, 63_956_712),
    "repvgg_b2g4": (61_758_376, 55_777_512),
    "repvgg_b3": (123_085_288, 110_960_872),
    "repvgg_b3g2": (96_911_848, 87_404_776),
    "repvgg_b3g4": (83_825_128, 75_626_728),
    "repvgg_d2se": (133_334_836, 120_387_572),
    "mobileone_s0": (5_293_272, 2_078_504),
    "mobileone_s1": (4_825_192, 4_764_840),
    "mobileone_s2": (7_884_648, 7_808_168),
    "mobileone_s3": (10_170_600, 10_078_312),
    "mobileone_s4": (14_951_248, 14_838_352),
}
# YOLOv6's backbones, which have no linear layer, in training
TRUNKS = {
    "efficientrep_n": 3_435_296,
    "efficientrep_s": 13_712_960,
    "efficientrep_m": 25_716_780,
    "efficientrep_l": 38_472_533,
}
# one of each kind of layer
KINDS = ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "efficientrep_n", "efficientrep_m", "mobileone_s0", "mobileone_s4"]


def number(model):
    return sum(p.numel() for p in model.parameters())


def small(name, **options):
    """A narrow and shallow network of the same kinds of layers."""
    torch.manual_seed(0)
    return create_backbone(name, width=0.125, depth=0.25, **options)


def on_paper(name, **options):
    """Its shapes, which cost no memory."""
    with torch.device("meta"):
        return create_backbone(name, **options)


def far_apart(a, b):
    """The largest difference as a fraction of the range."""
    return float((a - b).abs().max() / a.abs().max())


def test_every_network_has_its_numbers():
    assert list_backbones() == [*list_backbones("repvgg_*"), *TRUNKS, *list_backbones("mobileone_*")]
    assert set(list_backbones()) == set(PARAMETERS) | set(TRUNKS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_published_in_both_forms(name):
    model = on_paper(name)
    fused = fuse(model.eval())
    assert (number(model), number(fused)) == PARAMETERS[name]
    assert not multi_branch(fused)


@pytest.mark.parametrize("name", TRUNKS)
def test_parameters_of_yolov6s_backbones_are_those_published(name):
    assert number(on_paper(name, num_classes=0)) == TRUNKS[name]


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_what_fusing_gives_on_paper_it_gives_of_numbers(name):
    fused, planned = fuse(create_backbone(name).eval()), fuse(on_paper(name).eval())
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in planned.state_dict().items()}
    assert not any(p.is_meta for p in fused.parameters()) and all(p.is_meta for p in planned.parameters())


def test_yolov6_l_trains_without_branches():
    assert not multi_branch(on_paper("efficientrep_l")) and multi_branch(on_paper("efficientrep_m"))


def test_groups_and_gates_stand_where_they_are_published():
    layers = [m for stage in list(on_paper("repvgg_b1g4"))[:5] for m in stage]
    grouped = [i for i, layer in enumerate(layers) if layer.affine_part.kxk.conv.groups == 4]
    assert grouped == list(range(2, 27, 2)) and len(layers) == 28
    gated = [[i for i, m in enumerate(stage) if "gate" in m._modules] for stage in list(on_paper("mobileone_s4"))[:5]]
    assert gated == [[], [], [], list(range(10, 20)), [0, 1]]


@pytest.mark.parametrize("name", list_backbones())
def test_features_have_the_strides_and_channels_that_they_say(name):
    model = small(name, features_only=True).eval()
    maps = model(torch.rand(1, 3, 64, 64))
    assert model.strides == [2, 4, 8, 16, 32]
    assert [tuple(x.shape) for x in maps] == [(1, c, 64 // s, 64 // s) for c, s in zip(model.channels, model.strides)]


def test_features_are_the_stages_of_the_classifier():
    classifier = small("repvgg_a0").eval()
    features = small("repvgg_a0", features_only=True, out_indices=(-1, 1)).eval()
    shared = {k: v for k, v in classifier.state_dict().items() if not k.startswith("head.")}
    assert set(features.state_dict()) == set(shared)
    features.load_state_dict(shared)
    assert (features.strides, features.channels) == ([32, 4], [classifier.channels[4], classifier.channels[1]])
    last, second = features(noise(1))
    assert torch.equal(second, classifier.stage1(classifier.stem(noise(1))))
    assert torch.equal(classifier.head(last.mean((2, 3))), classifier(noise(1)))


def test_stages_behind_the_last_output_are_not_built():
    model = small("repvgg_a0", features_only=True, out_indices=[0, 2])
    assert [name for name, _ in model.named_children()] == ["stem", "stage1", "stage2"]
    assert model.strides == [2, 8] and model.out_indices == [0, 2]


def test_classes_and_channels_of_the_picture():
    assert small("mobileone_s1", num_classes=7, in_chans=1)(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    pooled = small("mobileone_s1", num_classes=0)
    assert pooled(torch.rand(2, 3, 32, 32)).shape == (2, pooled.channels[-1])


@pytest.mark.parametrize("name", KINDS)
def test_fused_networks_compute_the_same(name):
    for options in ({"num_classes": 10}, {"features_only": True}):
        model = randomize_norms(small(name, **options)).eval()
        fused = fuse(model)
        assert type(fused) is type(model) and (fused.strides, fused.channels) == (model.strides, model.channels)
        assert multi_branch(model) and not multi_branch(fused)
        with torch.no_grad():
            before, after = model(noise()), fused(noise())
        before, after = ([x] if isinstance(x, torch.Tensor) else x for x in (before, after))
        assert len(before) == len(after)
        for a, b in zip(before, after):
            assert far_apart(a, b) <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_networks_train_as_classifiers(name):
    model = small(name, num_classes=4)
    x, y = noise(4), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(3):
        losses.append(nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        assert not [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("features_only", [False, True])
def test_copies_and_pickles_are_the_same(features_only, fused):
    model = randomize_norms(small("repvgg_d2se", features_only=features_only)).eval()
    model = fuse(model) if fused else model
    assert type(model) in torch.serialization.get_safe_globals(), "known to weights-only loading"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert (again.strides, again.channels) == (model.strides, model.channels)
        assert all(torch.equal(a, b) for a, b in zip(again(noise(1)), model(noise(1))))


class WithFPN(nn.Module):
    """A feature pyramid on a list of maps, as torchvision's detectors want their backbone."""

    def __init__(self, body, out_channels=16):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


def test_torchvisions_retinanet_trains_on_one_and_predicts_the_same_fused():
    torch.manual_seed(0)
    body = small("repvgg_a0", features_only=True, out_indices=(2, 3, 4))
    sizes = {"min_size": 64, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model = RetinaNet(WithFPN(body), 3, anchor_generator=anchors, score_thresh=0.0, detections_per_img=20, **sizes)
    pictures = list(noise())
    objects = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in pictures]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(2):
        losses.append(sum(model(pictures, objects).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        assert not [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
    assert losses[1] < losses[0]
    randomize_norms(model).eval()
    with torch.no_grad():
        fused = fuse(model)
        before, after = model(pictures), fused(pictures)
    assert multi_branch(model) and not multi_branch(fused)
    for a, b in zip(before, after):
        assert len(a["boxes"]) == 20 and torch.equal(a["labels"], b["labels"])
        assert (a["boxes"] - b["boxes"]).abs().max() <= 1e-5 * 64 and far_apart(a["scores"], b["scores"]) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "repvgg_a"}, r"no backbone 'repvgg_a': did you mean repvgg_a\d.*Accepted are repvgg_a0, "),
        ({"name": "RepVGG-A0"}, r"no backbone 'RepVGG-A0'.*Accepted are repvgg_a0"),
        ({"num_classes": -1}, r"num_classes=-1 is not accepted"),
        ({"num_classes": 2.0}, r"num_classes=2.0 is not accepted"),
        ({"in_chans": 0}, r"in_chans=0 is not accepted"),
        ({"width": 0}, r"width=0 is not accepted; give a multiple"),
        ({"depth": float("nan")}, r"depth=nan is not accepted"),
        ({"depth": 65}, r"depth=65 is not accepted; give a multiple of what is published, such as 0.5, up to 64"),
        ({"out_indices": [1]}, r"out_indices=\[1\] needs features_only=True"),
        ({"out_indices": [], "features_only": True}, r"out_indices=\[\] is not accepted; give a list of stages, 0 to 4"),
        ({"out_indices": [5], "features_only": True}, r"0 to 4, or -5 to -1"),
        ({"out_indices": 3, "features_only": True}, r"out_indices=3 is not accepted"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_accepted(arguments, said):
    with pytest.raises(ValueError, match=said):
        create_backbone(**{"name": "repvgg_a0", **arguments})

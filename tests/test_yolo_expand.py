"""expand in Ultralytics: the key of a YAML, pretrained weights, `rep-yolo train expand=`, resume, the plain graph back."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from yolo_helpers import NAMES, noise, randomize_norms, tiny_data, train_args  # noqa: F401

from rep_backbones import expand, verify
from rep_backbones.candidates import ExpandError
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import checkpoint, cli, expand_key, fuse_export_cli
from rep_backbones.yolo.deploy import deploy_form, save_deploy
from rep_backbones.yolo.expand_key import named_in_args, with_yaml
from rep_backbones.yolo.safe_yaml import validated
from rep_backbones.yolo.trainer import RepTrainer

SMALL: dict[str, Any] = {
    "nc": len(NAMES),
    "scale": "n",  # up to 8.4.100 the stock parser fails at a C3k2 where there is none
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3k2", [16, True, 0.5]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc"]]],
}
CONVS = 15  # over 1x1 and with a norm: 3 + 2 x 2 in C3k2's C3k + 2 x 2 of boxes + 4 depthwise of classes


def plain(seed: int = 0, config: Any = None) -> Any:
    torch.manual_seed(seed)
    model = randomize_norms(DetectionModel(deepcopy(config or SMALL), verbose=False))
    head: Any = model.model[-1]
    for branch in [*head.cv2, *head.cv3]:
        nn.init.normal_(branch[-1].weight, 0, 0.3)
    return model.eval()


def written(**extra: Any) -> dict[str, Any]:
    return {**deepcopy(SMALL), **extra}


@pytest.fixture
def said():
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)


def count(model: nn.Module) -> int:
    return len(multi_branch(model))


def test_the_key_of_a_yaml(said: list[str]) -> None:
    every = DetectionModel(written(expand="DiverseBranchBlock"), verbose=True)
    assert count(every) == CONVS and f"expand: DiverseBranchBlock in the place of {CONVS} convolutions" in said
    some = {"block": "MobileOneBlock", "n": 2, "layers": ["model.0", "model.4.cv2.*"], "kernels": [3]}
    model = DetectionModel(written(expand=some), verbose=False)
    assert [path for path, _, _ in multi_branch(model)] == [
        "model.0.conv", *(f"model.4.cv2.{i}.{j}.conv" for i in (0, 1) for j in (0, 1))
    ]  # fmt: skip
    two = DetectionModel(written(expand=[{"block": "ACBlock", "layers": "model.0"}, "RepConv"]), verbose=False)
    assert count(two) == CONVS and "1xk" in dict(two.named_modules())["model.0.conv.sum"]._modules
    assert every.model[0].np > model.model[0].np, "the printed parameters count the branches"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("RepConf", "expand: RepConf: unknown layer 'RepConf': did you mean RepConv"),
        ({"layers": "model.0"}, "accepted are the name of a block"),
        (3, "accepted are the name of a block"),
        ({"block": "RepConv", "layers": "neck"}, "'neck' matches no convolution. There are model.0.conv"),
        ({"block": "RepConv", "m": 1}, "option 'm' of RepConv"),
        ({"block": "QARepVGGBlock"}, "normalizes its kxk branch and again"),
        ({"block": "RepConv", "batches": [1]}, "accepted are the name of a block"),
    ],
    ids=str,
)
def test_bad_keys_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DetectionModel(written(expand=given), verbose=False)


def test_yamls_of_strangers_are_checked() -> None:
    assert validated(written(expand={"block": "MobileOneBlock", "n": 2}))
    for bad in ({"block": "MobileOneBlock", "n": 10**6}, {"block": "RepConv", "layers": {"a": 1}}):
        with pytest.raises(checkpoint.Refused, match="gives expand"):
            validated(written(expand=bad))


def test_a_model_notes_its_expansion_and_is_rebuilt() -> None:
    model = plain()
    expanded = expand(model, "RepConv", layers=lambda path, conv: ".4.cv2." in path)
    assert verify(model, expanded, [noise()]) and not count(model) and "expand" not in model.yaml
    assert expanded.yaml["expand"][0]["layers"] == [path for path, _, _ in multi_branch(expanded)]
    both = expand(expanded, "OREPABlock", kernels=3)
    again = DetectionModel(deepcopy(both.yaml), verbose=False)
    assert list(again.state_dict()) == list(both.state_dict()) and count(both) == CONVS
    with pytest.raises(ExpandError, match="There are"):
        expand(both, "RepConv", kernels=3)


def test_plain_weights_transfer_completely(said: list[str]) -> None:
    model, expanded = plain(), DetectionModel(written(expand="DiverseBranchBlock"), verbose=False)
    expanded.load(model)
    items = len(model.state_dict())
    assert f"Transferred {items}/{items} items from pretrained weights" in said
    assert count(expanded) == CONVS and verify(model, expanded.eval(), [noise()], tolerance=1e-6)
    # what a head gives in train mode differs between releases; the maps in front of it do not
    maps = [nn.Sequential(*list(m.train().model)[:-1])(noise()) for m in (model, expanded)]
    assert torch.equal(*maps)


def test_expanded_weights_are_not_lost_in_a_plain_model() -> None:
    with pytest.raises(ValueError, match="branches would be lost.*same `expand:`"):
        plain().load(expand(plain(), "RepConv"))


def test_fused_on_every_path_is_the_stock_model() -> None:
    model = plain()
    stock = deepcopy(model).fuse(verbose=False)
    fused = deepcopy(expand(model, "DiverseBranchBlock")).fuse(verbose=False)
    assert fused.is_fused() and [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert list(fused.state_dict()) == list(stock.state_dict()) and verify(stock, fused, [noise()])


WITHOUT_US = """
import sys, torch
from ultralytics import YOLO
model = YOLO(sys.argv[1])
model.predict(torch.rand(1, 3, 64, 64), verbose=False)
assert "rep_backbones" not in sys.modules
print(len(model.model.state_dict()))
"""


def test_the_deploy_checkpoint_is_plain(tmp_path: Path) -> None:
    model = plain()
    stock = deepcopy(model).fuse(verbose=False)
    deployed = deploy_form(expand(model, "RepConv"))
    assert list(deployed.state_dict()) == list(stock.state_dict()) and verify(model, deployed, [noise()])
    save_deploy(expand(model, "RepConv"), tmp_path / "best_deploy.pt")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_US, str(tmp_path / "best_deploy.pt")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split()[-1] == str(len(stock.state_dict())), done.stderr
    assert verify(model, checkpoint.load(tmp_path / "best_deploy.pt").model, [noise()])


def test_a_class_branch_of_pretrained_width_is_read_back(tmp_path: Path) -> None:
    """8.4.190 keeps the width that 80 classes gave, and its YAML does not say so."""
    model = plain()
    wide = plain(config={**SMALL, "nc": 90})
    head = model.model[-1]
    source = deepcopy(wide.model[-1].cv3)
    assert source[0][-1].in_channels != head.cv3[0][-1].in_channels
    for branch in source:
        branch[-1] = nn.Conv2d(branch[-1].in_channels, len(NAMES), 1)
    head.cv3 = source
    torch.save({"model": model, "train_args": {"task": "detect"}}, tmp_path / "best.pt")
    assert verify(model.eval(), checkpoint.load(tmp_path / "best.pt").model, [noise()])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["val", "model=x.pt", "expand=RepConv"], "expand= is for `rep-yolo train`"),
        (["train", "expand=RepConv"], "needs the model that is expanded"),
        (["train", "model=x.yaml", "resume=True", "expand=RepConv"], "exclude each other"),
        (["train", "model=yolo11n.yaml", "expand=RepConf"], "unknown layer 'RepConf'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_command_refuses(args: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_yaml(args, trust=False)


@pytest.mark.slow
def test_trained_interrupted_resumed_fused_and_exported(
    tmp_path: Path,
    tiny_data: Path,  # noqa: F811
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = tmp_path / "yolo11n.pt"
    torch.manual_seed(0)
    stock = DetectionModel("yolo11n.yaml", nc=len(NAMES), verbose=False)
    torch.save({"model": deepcopy(stock), "train_args": {"task": "detect"}}, weights)
    given = [f"{key}={value}" for key, value in train_args(tiny_data, tmp_path, epochs=2).items()]
    saving = RepTrainer.save_model

    def interrupted(self: Any) -> Any:
        saving(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(RepTrainer, "save_model", interrupted)
    assert cli.main(["train", f"model={weights}", "expand=DiverseBranchBlock", *given]) == 130
    monkeypatch.setattr(RepTrainer, "save_model", saving)
    items = len(stock.state_dict())
    assert f"Transferred {items}/{items} items from pretrained weights" in said
    last = tmp_path / "run" / "weights" / "last.pt"
    assert cli.main(["train", f"model={last}", "resume=True"]) == 0
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 3, "two epochs"
    best = checkpoint.load(last.with_name("best.pt"))
    loud = [m for m in best.model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.abs().max() > 0]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in best.model.modules())
    assert count(best.model) == 42 and len(loud) > 0.9 * norms, "in FP16 the smallest first steps are zero"
    assert fuse_export_cli.main([str(last.with_name("best.pt")), "--imgsz", "64"]) == 0

    report = json.loads((last.parent / "best_deploy_report.json").read_text())
    whole = YOLO(str(weights))
    whole.model.args = {"imgsz": 64, "data": str(tiny_data)}
    reference = Path(whole.export(format="onnx", imgsz=64, opset=18, simplify=True, device="cpu"))
    fused = stock.eval().fuse(verbose=False)
    assert report["counts"]["after"]["convs"] == sum(isinstance(m, nn.Conv2d) for m in fused.modules())
    assert report["counts"]["after"]["parameters"] == sum(p.numel() for p in fused.parameters())
    ours, theirs = onnx.load(last.parent / "best_deploy.onnx").graph, onnx.load(reference).graph
    assert len(ours.node) == len(theirs.node)
    assert sorted(node.op_type for node in ours.node) == sorted(node.op_type for node in theirs.node)


@pytest.mark.parametrize(("name", "family"), [("rtdetr-l.yaml", "RTDETR"), ("yolo11n.yaml", "YOLO")])
def test_the_family_of_a_model_is_kept(name: str, family: str) -> None:
    """Ultralytics chooses the class of a model, and so its trainer, by a word in the file's name."""
    found = with_yaml(["train", f"model={name}", "expand=RepVGGBlock", "data=x.yaml"], trust=False)
    stem = Path(next(arg for arg in found if arg.startswith("model="))[6:]).stem
    assert ("rtdetr" in stem) == (family == "RTDETR")


@pytest.mark.parametrize("value", ["", "None", "False", "0"])
def test_a_key_without_a_block_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"expand={value} names no block"):
        with_yaml(["train", "model=yolo11n.yaml", f"expand={value}"], trust=False)


@pytest.mark.parametrize("model", ["yolo11n.pt", "yolo11n.yaml"])
def test_workers_are_told_of_an_expansion_made_in_python(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 8.4.100 they build their model from the arguments alone; the caller's are as before afterwards."""
    expanded = expand(DetectionModel("yolo11n.yaml", verbose=False), "RepVGGBlock", kernels=3)
    args = SimpleNamespace(model=model, pretrained=True)
    with named_in_args(SimpleNamespace(args=args, model=expanded)):
        again = DetectionModel(args.model, verbose=False)
        assert [path for path, _, _ in multi_branch(again)] == [path for path, _, _ in multi_branch(expanded)]
        assert args.pretrained == (model if model.endswith(".pt") else True)
        named = args.model
    assert vars(args) == {"model": model, "pretrained": True}
    with named_in_args(SimpleNamespace(args=SimpleNamespace(model=named), model=expanded)) as _:
        assert expand_key._named_yaml(named)["expand"], "named already: left as it is"
    plain = SimpleNamespace(args=SimpleNamespace(model=model), model=DetectionModel("yolo11n.yaml", verbose=False))
    with named_in_args(plain):
        assert plain.args.model == model


def test_what_was_calibrated_is_not_lost_silently() -> None:
    """A training builds the model anew from its YAML, which cannot measure branches on batches."""
    plain = DetectionModel("yolo11n.yaml", verbose=False).eval()
    normed = expand(plain, "RepVGGBlock", kernels=3, batches=[torch.rand(1, 3, 64, 64)])
    again = DetectionModel(deepcopy(normed.yaml), verbose=False)
    assert len(multi_branch(again)) == len([m for _, m, _ in multi_branch(normed) if m.norm_here]) > 20
    fused = deepcopy(plain).fuse(verbose=False)
    bare = expand(fused, "RepVGGBlock", layers="model.0.conv", batches=[torch.rand(1, 3, 64, 64)])
    assert len(multi_branch(bare)) == 1
    with pytest.raises(ValueError, match="its branches measured on batches; a training that builds"):
        DetectionModel(deepcopy(bare.yaml), verbose=False)

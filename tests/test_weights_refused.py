"""What `load_weights` refuses: the message names the tensors, and the model is as it was."""

from __future__ import annotations

import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models as theirs
import pytest
import torch
from test_weights import authors_repvgg, backbone, detector, made, stages, v6
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

import rep_backbones
from rep_backbones.weights import WeightsError, load_weights

State = dict[str, Tensor]


def refused(model: nn.Module, source: Any, *words: str) -> str:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        rep_backbones.load_weights(model, source)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the model was changed"
    return message


def renamed(state: State) -> None:
    state["stage2.0.rbr_3x3.conv.weight"] = state.pop("stage2.0.rbr_dense.conv.weight")


def without(*keys: str) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        for key in [key for key in state if any(key == name or key.startswith(f"{name}.") for name in keys)]:
            del state[key]

    return spoil


def reshaped(key: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({key: torch.zeros(shape)})


def holding_nan(state: State) -> None:
    state["stage1.0.rbr_1x1.bn.bias"][0] = float("nan")


SPOILT: dict[str, tuple[Callable[[State], None], tuple[str, ...]]] = {
    "a renamed key": (renamed, ("stage2.0.rbr_3x3.conv.weight", "not known")),
    "a tensor more": (reshaped("stage9.0.rbr_dense.conv.weight", 8, 8, 3, 3), ("stage9.0.rbr_dense.conv.weight",)),
    "a tensor less": (without("stage3.0.rbr_1x1.bn.running_var"), ("stage3.0", "1x1.bn.running_var", "branches.1x1.bn")),
    "a branch less": (without("stage3.1.rbr_identity"), ("stage3.1", "identity.", "branches.identity")),
    "a layer less": (without("stage3.1"), ("stage3.1",)),
    "the last layer of a stage less": (without("stage3.2"), ("stage4.0.rbr_dense.conv.weight", "does not fit", "stage3.2")),
    "a stage less": (without("stage4"), ("no stage4",)),
    "the last layer less": (without("linear"), ("head.weight, head.bias", "not in the file")),
    "half of the last layer": (without("linear.bias"), ("linear", "head.bias")),
    "another shape": (
        reshaped("stage2.0.rbr_dense.conv.weight", 16, 16, 5, 5),
        ("stage2.0.rbr_dense.conv.weight (16, 16, 5, 5)", "stage2.0.branches.kxk.conv.weight (24, 16, 3, 3)"),
    ),
    "other classes": (reshaped("linear.weight", 7, 320), ("7 classes", "num_classes=7", "strict=False")),
    "NaN": (holding_nan, ("stage1.0.rbr_1x1.bn.bias", "NaN")),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file(name: str) -> None:
    source, ours = authors_repvgg("repvgg_a0")
    spoil, words = SPOILT[name]
    state = source.state_dict()
    spoil(state)
    assert refused(ours, state, "RepVGG's authors'", "Nothing was changed", *words)


def test_a_merged_file_that_is_spoilt() -> None:
    source, ours = authors_repvgg("repvgg_a0")
    state = theirs.deployed(source).state_dict()
    kernel = state.pop("stage2.0.rbr_reparam.weight")
    assert refused(ours, state, "stage2.0")
    state["stage2.0.rbr_reparam.weight"] = kernel[:, :, 1:, 1:]
    assert refused(ours, state, "stage2.0.rbr_reparam.weight (24, 16, 2, 2)", "(24, 16, 3, 3)")


def test_branches_that_are_spoilt_for_a_fused_model() -> None:
    source, ours = authors_repvgg("repvgg_a0")
    fused = rep_backbones.fuse(ours)
    whole = source.state_dict()
    for key in ("stage2.0.rbr_dense.conv.weight", "stage2.0.rbr_1x1.bn.running_mean", "stage3.1.rbr_identity.bias"):
        assert refused(fused, {name: tensor for name, tensor in whole.items() if name != key}, key.rpartition(".rbr")[0])


@pytest.mark.parametrize(
    ("source", "target"), [("repvgg_a0", "repvgg_b0"), ("repvgg_a0", "repvgg_a1"), ("repvgg_d2se", "repvgg_b0")]
)
def test_another_network(source: str, target: str) -> None:
    assert refused(backbone(target, width=0.25, depth=0.4), authors_repvgg(source)[0].state_dict(), "does not fit")


def test_a_file_of_another_family() -> None:
    mobileone = made(lambda: theirs.MobileOne((16, 16, 16, 32, 32), (1, 1, 1, 1), 2, (0, 0, 0, 0)))
    assert refused(backbone("repvgg_a0", width=0.25, depth=0.2), mobileone.state_dict(), "stage0.rbr_conv.0", "kxk.")


def test_yolov6_of_another_form_of_neck() -> None:
    state = v6("n").state_dict()
    state["neck.upsample0.upsample_transpose.weight"] = state.pop("neck.Bifusion0.upsample.upsample_transpose.weight")
    assert refused(detector("efficientrep"), state, "neck.upsample0.upsample_transpose.weight", "not known")
    state = v6("n").state_dict()
    without("neck.Rep_n4")(state)
    assert refused(detector("efficientrep"), state, "no neck.Rep_n4")
    state = v6("m").state_dict()
    state["backbone.ERBlock_2.1.cv9.block.conv.weight"] = torch.zeros(1)
    assert refused(detector("efficientrep-m"), state, "backbone.ERBlock_2.1.", "not known")


def test_a_row_of_yolov7_that_is_not_there() -> None:
    target: Any = made(lambda: DetectionModel(dict(theirs.YOLOv7.YAML), verbose=False))
    state = made(theirs.YOLOv7).state_dict()
    without("model.4")(state)
    assert refused(target, state, "model.4.conv.weight", "not in the file")
    state["model.2.conv.weight"] = torch.zeros(8, 8, 3, 3)
    assert refused(target, state, "model.2")
    assert refused(backbone("repvgg_a0", width=0.25, depth=0.2), made(theirs.YOLOv7).state_dict(), "numbered rows", "YAML")


def test_names_of_nobody() -> None:
    ours = backbone("repvgg_a0", width=0.25, depth=0.2)
    message = refused(ours, {"features.0.weight": torch.zeros(3), "features.0.bias": torch.zeros(3)}, "features.0.weight")
    assert "YOLOv6's" in message and "timm" in message and "our own" in message


def test_our_own_names_spoilt() -> None:
    ours = backbone("repvgg_a0", width=0.25, depth=0.2)
    state = dict(ours.state_dict())
    state["stem.0.branches.kxk.conv.wait"] = state.pop("stem.0.branches.kxk.conv.weight")
    assert refused(ours, state, "stem.0.branches.kxk.conv.weight")
    state = dict(ours.state_dict(), **{"head.weight": torch.zeros(3, 320)})
    assert refused(ours, state, "head.weight (3, 320)", "head.weight (10, 320)")
    state = dict(ours.state_dict())
    del state["stem.0.branches.1x1.bn.running_mean"]
    assert refused(ours, state, "stem.0.branches.1x1.bn.running_mean")


def test_not_strict_loads_what_fits_and_names_the_rest() -> None:
    source, ours = authors_repvgg("repvgg_a0")
    state = source.state_dict()
    state["linear.weight"], state["linear.bias"] = torch.zeros(7, 320), torch.zeros(7)
    state["auxiliary.weight"] = torch.zeros(3)
    head = ours.get_parameter("head.weight").clone()
    report = load_weights(ours, state, strict=False)
    assert report.unused == ("linear.weight", "linear.bias", "auxiliary.weight")
    assert report.missing == ("head.weight", "head.bias")
    assert torch.equal(ours.get_parameter("head.weight"), head)
    assert torch.equal(ours.get_parameter("stage4.0.branches.kxk.conv.weight"), state["stage4.0.rbr_dense.conv.weight"])
    text = str(report)
    assert "auxiliary.weight" in text and "head.weight" in text and "7 classes" in text
    assert f"{len(state) - 3} of {len(state)} tensors loaded" in text


def test_not_strict_with_our_own_names() -> None:
    source, ours = (backbone("repvgg_a0", width=0.25, depth=0.2) for _ in range(2))
    state = dict(source.state_dict(), **{"head.weight": torch.zeros(3, 320), "more": torch.ones(1)})
    report = load_weights(ours, state, strict=False)
    assert set(report.unused) == {"head.weight", "more"} and report.missing == ("head.weight",)


def test_a_trunk_that_ends_where_a_stage_ends() -> None:
    source, _ = authors_repvgg("repvgg_a0")
    ours = rep_backbones.create_backbone("repvgg_a0", features_only=True, out_indices=[1, 3], width=0.25, depth=0.2)
    report = load_weights(ours, source.state_dict())
    assert {key.split(".")[0] for key in report.unused} == {"stage4", "linear"}
    assert len(stages(ours)) == 4
    del ours.stage3[2]  # type: ignore[union-attr]
    assert refused(ours, source.state_dict(), "stage3.2", "no layer for")


# ---- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours() -> nn.Module:
    return backbone("repvgg_a0", width=0.25, depth=0.2)


@pytest.fixture
def state() -> State:
    return authors_repvgg("repvgg_a0")[0].state_dict()


WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "module.": lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    "ema": lambda state: {"model": {"stem": torch.zeros(1)}, "ema": {"state_dict": state}},
    "no ema": lambda state: {"ema": None, "model": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt"])
def test_where_training_code_puts_weights(name: str, suffix: str, ours: nn.Module, state: State, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.save(WRAPPED[name](state), file, _use_new_zipfile_serialization=suffix != ".pth.tar")
    report = rep_backbones.load_weights(ours, file)
    assert report.source == str(file) and not report.unused and not report.missing
    assert torch.equal(ours.get_parameter("head.weight"), state["linear.weight"])


def test_safetensors(ours: nn.Module, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("safetensors.torch")
    file = tmp_path / "weights.safetensors"
    library.save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    assert not rep_backbones.load_weights(ours, str(file)).missing
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(ours, file, str(file), "truncated")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert refused(ours, file, "pip install safetensors")


class Runs:
    """A pickle that would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_file_with_code_is_not_executed(ours: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, "config": Runs(tmp_path / "made")}, tmp_path / "evil.pth")
    assert refused(ours, tmp_path / "evil.pth", "evil.pth", "mkdir", "nothing in it was executed", "state_dict()")
    assert not (tmp_path / "made").exists()


def test_a_whole_model_is_refused_with_what_to_do(ours: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": theirs.YOLOv7()}, tmp_path / "yolov7.pth")
    assert refused(ours, tmp_path / "yolov7.pth", "foreign_models.YOLOv7", "torch.save(model.float().state_dict()")
    torch.save(rep_backbones.blocks.RepVGGBlock(3, 8), tmp_path / "block.pth")
    assert refused(ours, tmp_path / "block.pth", "torch.save(model.float().state_dict()")


def test_files_that_are_none(ours: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "page.pth": b"<html>not found</html>",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "weights_only" not in refused(ours, tmp_path / name, name, "damaged")
    assert refused(ours, tmp_path / "none.pth", "none.pth", "does not exist")
    assert refused(ours, tmp_path, "is a folder")
    assert refused(ours, "https://example.com/weights.pth", "nothing is downloaded")
    (tmp_path / "weights.onnx").write_bytes(whole)
    assert refused(ours, tmp_path / "weights.onnx", ".onnx", ".pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert refused(ours, tmp_path / "list.pth", "list")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    assert refused(ours, tmp_path / "epoch.pth", "no tensors", "epoch")
    assert refused(ours, {}, "nothing")
    assert refused(ours, {**state, "epoch": 3}, "epoch", "int")
    with pytest.raises(TypeError, match="int"):
        rep_backbones.load_weights(ours, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="torch.nn.Module"):
        rep_backbones.load_weights("yolo", state)


def test_a_model_without_memory(state: State) -> None:
    with torch.device("meta"):
        ours = rep_backbones.create_backbone("repvgg_a0", num_classes=10, width=0.25, depth=0.2)
    with pytest.raises(WeightsError, match="to_empty"):
        load_weights(ours, state)


def test_a_small_file_claims_no_more_memory_than_it_has(ours: nn.Module, tmp_path: Path) -> None:
    """Compressed, as PyTorch reads it too: 2 GB of zeros in 2 MB."""
    torch.save({"stem": torch.zeros(1 << 20)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            with bomb.open(name, "w", force_zip64=True) as record:
                for _ in range(512 if name.endswith("/data/0") else 1):
                    record.write(whole.read(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(ours, tmp_path / "bomb.pth", "bomb.pth", "is compressed", "save it with torch.save")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10

"""Artefacts are run by the ending of their name, any number of pictures at once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from test_fuse_export import saved

from rep_backbones.rules import multi_branch
from rep_backbones.yolo import backends, checkpoint, fuse_export
from rep_backbones.yolo.backends import MissingBackend, Runner, predictor, runner

NEEDED = {"openvino": ("openvino",), "ncnn": ("ncnn", "pnnx")}
FORMATS = [
    name for name in ("onnx", "torchscript", "openvino", "ncnn") if all(map(importlib.util.find_spec, NEEDED.get(name, ())))
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The artefacts of a small model for two pictures, by format, and "trained"."""
    weights = saved(tmp_path_factory.mktemp("made"), loud=True)
    outcome = fuse_export.run(weights, formats=tuple(FORMATS), batch=2, latency=False)
    assert outcome.status == 0
    return {"trained": weights, **outcome.artifacts}


@pytest.mark.parametrize("name", ["trained", "pt", *FORMATS])
def test_any_number_of_pictures(name: str, made: dict[str, Path]) -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 3, 64, 64)
    trained = checkpoint.load_precise(made["trained"]).model.eval()
    with torch.no_grad():
        expected = trained(x)[0]
    predict = predictor(made[name])
    for n in (5, 2, 1):
        found = predict(x[:n])
        assert found.shape == (n, 7, 80) and found.dtype == torch.float32
        for part, limit in ((slice(0, 4), 1e-3), (slice(4, 7), 1e-5)):  # pixels, and scores
            assert torch.allclose(found[:, part], expected[:n, part], rtol=0, atol=limit)


def test_a_trained_checkpoint_is_run_with_its_branches(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(backends, "model_runner", lambda model, device: given.append(model) or Runner(lambda x: [x]))
    for name in ("trained", "pt"):
        runner(made[name])
    assert [len(multi_branch(model)) for model in given] == [4, 0]


def test_the_exporters_notes_are_read(made: dict[str, Path]) -> None:
    for name in FORMATS:
        run = runner(made[name])
        assert run.about["task"] == "detect" and list(run.about["names"]) in ([0, 1, 2], ["0", "1", "2"])
        assert run.batch == (None if name == "ncnn" else 2) and run.precision == "fp32" and run.device == "cpu"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("best.tflite", "x", "accepted are names that end with .pt, .onnx, .torchscript"),
        ("gone.onnx", None, "does not exist"),
        ("bad.onnx", "x", "bad.onnx is not"),
        ("bad.torchscript", "x", "bad.torchscript is not accepted"),
        ("bad_openvino_model", "x", "there is no *.xml"),
        ("bad_ncnn_model", "x", "there is no *.param"),
    ],
)
def test_what_cannot_be_run(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if "openvino" in name and "openvino" not in FORMATS or "ncnn" in name and "ncnn" not in FORMATS:
        pytest.skip("its runtime is not installed")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        runner(tmp_path / name)
    assert said in str(error.value) and name in str(error.value)


def test_a_runtime_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (tmp_path / "x_openvino_model").mkdir()
    with pytest.raises(MissingBackend, match=r"x_openvino_model cannot be run here.*pip install openvino"):
        runner(tmp_path / "x_openvino_model")

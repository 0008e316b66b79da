"""What is measured of the branches, and how it is written and drawn."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from yolo_helpers import built, model_yaml, noise, tiny_data, train_args  # noqa: F401

from rep_backbones import fuse
from rep_backbones.blocks import RepConv, RepVGGBlock
from rep_backbones.rules import multi_branch
from rep_backbones.yolo import branch_log
from rep_backbones.yolo.trainer import RepTrainer


def test_shares_are_norms_of_the_branches_kernels() -> None:
    """Kernels typed in by hand: norms 3, 4 and 1 of the 3x3, the 1x1 and the identity, under norms that keep values."""
    layer = RepVGGBlock(1, 1, 3, 1).eval()
    ((_, _, parallel),) = multi_branch(nn.Sequential(layer))
    branches = dict(parallel.items())
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(1 - module.eps)
        convs = {name: next(m for m in branches[name].modules() if isinstance(m, nn.Conv2d)) for name in ("kxk", "1x1")}
        convs["kxk"].weight.fill_(1.0)  # norm sqrt(9)
        convs["1x1"].weight.fill_(-4.0)
    found = branch_log.shares(nn.Sequential(layer))
    assert found == {"0": pytest.approx({"kxk": 3 / 8, "1x1": 4 / 8, "identity": 1 / 8})}


def test_dead_layer_has_shares_of_zero() -> None:
    layer = RepConv(4, 4).eval()
    nn.init.zeros_(next(m for m in layer.modules() if isinstance(m, nn.Conv2d)).weight)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.zero_()
    assert set(branch_log.shares(nn.Sequential(layer))["0"].values()) == {0.0}


def test_measure_sees_a_wrong_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = built(tmp_path), noise()
    right = branch_log.measure(model, images)
    assert 0 < right.error < 1e-5 and right.worst

    def wrong(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        with torch.no_grad():
            fused.get_submodule("model.2.1")[0].bias.add_(1.0)
        return fused

    monkeypatch.setattr(branch_log, "fuse", wrong)
    assert branch_log.measure(model, images).error > 1e-4


def test_log_keeps_rows_before_and_replaces_from_its_epoch_on(tmp_path: Path) -> None:
    log = branch_log.BranchLog(tmp_path)
    for epoch in (1, 2, 3):
        log.write(epoch, branch_log.Measurement(epoch * 1e-7, "0", {"m": {"kxk": 0.25, "1x1": 0.75}}))
    branch_log.BranchLog(tmp_path, resume=True).write(2, branch_log.Measurement(9e-7, "1", {"m": {"kxk": 0.5, "new": 0.5}}))
    assert (tmp_path / "branches.csv").read_text().splitlines() == [
        "epoch,fuse_error,worst_output,m/kxk,m/1x1,m/new",
        "1,1e-07,0,0.25,0.75,",
        "2,9e-07,1,0.5,,0.5",
    ]
    branch_log.BranchLog(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_the_rows(tmp_path: Path) -> None:
    log = branch_log.BranchLog(tmp_path)
    log.plot()
    assert not log.png.exists(), "nothing to draw"
    for epoch in range(1, 5):
        share = 0.2 + 0.1 * epoch
        layers = {f"model.{i}": {"kxk": share, "1x1": 1 - share} for i in range(3)}
        log.write(epoch, branch_log.Measurement(epoch * 1e-7, "0", layers))
    log.plot()
    picture = cv2.imread(str(log.png))
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    blue = np.array([180, 119, 31])  # the first branch's colour: bars of at least half the width in three rows
    assert (np.abs(picture.astype(int) - blue).max(2) < 8).sum() > 5000


def test_pictures_are_fixed_and_no_generator_moves(tmp_path: Path, tiny_data: Path) -> None:  # noqa: F811
    run = RepTrainer(overrides={"model": str(model_yaml(tmp_path)), **train_args(tiny_data, tmp_path)})
    run.setup_model()
    dataset = run.build_dataset(run.data["val"], "val", 4)
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = branch_log.fixed_images(dataset)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert images.shape[:2] == (2, 3) and images.shape[2] % 32 == images.shape[3] % 32 == 0  # validation pads to the stride
    assert images.dtype == torch.float32 and 0.5 < images.max() <= 1
    assert torch.equal(images, branch_log.fixed_images(dataset))

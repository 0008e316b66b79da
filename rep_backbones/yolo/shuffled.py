"""Models as training leaves them, for what is measured without one: norms whose statistics are not fresh."""

from __future__ import annotations

import torch
from torch import nn

from rep_backbones.containers import Parallel


def shuffled(model: nn.Module) -> nn.Module:
    """Gives every norm random statistics, as a trained model has them; changes and returns `model`."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[operator, union-attr]
                module.running_var.uniform_(0.3, 1.3)  # type: ignore[operator, union-attr]
                module.weight.normal_(0.8, 0.3)
                module.bias.normal_(0, 0.3)
        for total in model.modules():
            if isinstance(total, Parallel):  # else sums grow from layer to layer, to where rounding decides the outputs
                for module in total.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.weight.div_(len(total) ** 0.5)
    return model

"""Online re-parameterization: the branches are folded inside `forward`, and one convolution runs, in training too.

Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rep_backbones.rules import MERGED, RULES, equivalent


class Online(nn.Module):
    """An affine module without batch normalization, run as the one convolution that it is equal to.

    The fold is differentiable and is done in the parameters' own dtype, also under autocast.
    """

    def __init__(self, branches: nn.Module) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):  # such as the meta device
            return equivalent(self.branches)(x)
        with torch.autocast(kind, enabled=False):
            value = equivalent(self.branches)
        return value(x)


RULES[Online] = lambda module, channels: equivalent(module.branches, channels)
MERGED.add(Online)

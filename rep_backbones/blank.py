"""A convolution whose numbers are about to be written."""

from __future__ import annotations

from torch import nn


class BlankConv(nn.Conv2d):
    """Draws no random numbers. `nn.utils.skip_init` goes by way of the meta device, which takes seconds to load."""

    def reset_parameters(self) -> None:
        """Leaves them as they are."""

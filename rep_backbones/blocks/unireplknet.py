"""UniRepLKNet's dilated re-parameterization block.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", CVPR 2024, section 3.1 and eq. 3: a depthwise KxK
convolution and several small dilated ones, each with its own BN, are summed. They fold to the KxK one: a dilated kernel is
the same as a larger one with zeros between its taps.
"""

from __future__ import annotations

from torch import nn

from rep_backbones.blocks.frame import Frame
from rep_backbones.blocks.parts import Act, Groups, Size, activation
from rep_backbones.containers import Block, Parallel
from rep_backbones.registry import register_layer

# of the authors' code: K -> (kernel size, dilation) of each small branch
SMALL = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
    # below the paper's sizes
    3: ((1, 1),),
    1: (),
}


@register_layer
class DilatedReparamBlock(Block):
    """Depthwise KxK + dilated small ones, no activation unless `act` names one. `(n, c1, h, w)` -> `(n, c2, h / s, w / s)`.

    Kernels between the sizes of the paper, which are 5 to 17, take the small ones of the next lower size;
    along an axis where a small kernel does not fit it has extent 1.

    Args:
        g: "depthwise" (default) for as many groups as the channels allow, or a number.

    Raises:
        ValueError: for an even `k`, or groups that do not divide the channels.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 7,
        s: Size = 1,
        p: Size | None = None,
        g: Groups = "depthwise",
        act: Act = True,
    ) -> None:
        frame = Frame.of(c1, c2, k, s, p, g, 1)
        branches: dict[str, nn.Module] = {"kxk": frame.branch()}
        frame.aligned((1, 1))  # refuses even kernels
        for size, step in SMALL[max(n for n in SMALL if n <= max(frame.k))]:
            kernel = tuple(size if step * (size - 1) < large else 1 for large in frame.k)
            dilation = tuple(step if n > 1 else 1 for n in kernel)
            branches[f"{size}x{size}_d{step}"] = frame.branch(kernel, dilation)  # type: ignore[arg-type]
        super().__init__(Parallel(branches), act=activation(act, nn.Identity))

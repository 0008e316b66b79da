"""What a sum of branches keeps for the backward: not what takes less to compute again than to keep.

A batch norm keeps its input. Behind a 1x1 or another small convolution that is a whole feature map, which the convolution
makes again from its own input and weight, and those it keeps for itself. So the norm forgets its input when the layer's
forward is over, and asks the convolution in the backward, whose turn comes later. An average pooling keeps its input only to
know its shape, so it is left the shape.

Nothing is replaced but what autograd's nodes have saved, by the hook that PyTorch has for it: the forward, the gradients and
their order stay as they are. The convolution tells its input and weight through autograd, which refuses them where they were
changed in place, where the graph was freed, and gives them in the dtype that autocast made. Where other hooks keep what is
saved (torch.utils.checkpoint, save_on_cpu) nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

Kept = Callable[[], Any]  # gives what a node has saved of one tensor

# the node of a batch norm -> what it has saved of its input
NORMS: dict[str, Callable[[Any], Any]] = {
    "NativeBatchNormBackward0": lambda node: node._raw_saved_input,
    "CudnnBatchNormBackward0": lambda node: node._raw_saved_input,
    "MiopenBatchNormBackward0": lambda node: node._raw_saved_input,
    "SyncBatchNormBackward": lambda node: node._raw_saved_tensors[0],
}
CONVOLUTION, POOL, CAST = "ConvolutionBackward0", "AvgPool2DBackward0", "ToCopyBackward0"
POOLED_ON = ("cpu", "cuda")  # devices whose average pooling does not read its input in the backward

FEW = 9  # multiplications for each value that cost no more than to write and read it: those of a depthwise 3x3
SHARE = 4  # and otherwise at most a quarter of those of the layer's dearest convolution
LONGEST = 32  # nodes of a branch, so that no walk leads through a whole network


def applies(x: Tensor) -> bool:
    """Whether there is a graph of autograd to look at: not for tracers, compilers, tensors of another kind, or no_grad."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    return torch.is_grad_enabled()


def added(x: Tensor, outputs: Iterable[Tensor]) -> Tensor:
    """The sum of what branches on `x` give, with less kept for the backward; where it `applies`."""
    values = iter(outputs)
    total = next(values)
    ends: list[tuple[Any, Kept | None]] = [(total.grad_fn, None)]
    for index, y in enumerate(values):
        ends.append((y.grad_fn, None))
        # the sum of the first two is new, and no backward needs it
        if index and (y.shape, y.dtype) == (total.shape, total.dtype):
            total += y
        else:
            total = total + y
    release(x, ends)
    return total


def release(x: Tensor, ends: Iterable[tuple[Any, Kept | None]]) -> None:
    """Let autograd forget what the backward of branches can compute again cheaply, or knows by its shape.

    Args:
        x: the branches' input.
        ends: the nodes of their outputs, `y.grad_fn`, None for an output without a graph; each with how to get at what is
            kept of that output for a norm behind it, if one is.
    """
    convolutions: list[tuple[int, Any, Kept | None]] = []  # multiplications, the node, and what the norm behind it keeps
    for node, kept in _walked(x.grad_fn, ends):
        name = type(node).__name__
        if name == CONVOLUTION:
            convolutions.append((_multiplications(node), node, kept))
        elif name == POOL and x.device.type in POOLED_ON:
            _forget(node._raw_saved_self)
    dearest = max((cost for cost, _, _ in convolutions), default=0)
    for cost, node, kept in convolutions:
        if kept is not None and 0 < cost <= max(FEW, dearest // SHARE):
            _forget(kept(), partial(_again, node))


def _walked(first: Any, ends: Iterable[tuple[Any, Kept | None]]) -> Iterator[tuple[Any, Kept | None]]:
    """The nodes of each branch from its output back to `first`, which made its input; each with what a norm keeps of it."""
    for node, kept in ends:
        for _ in range(LONGEST):
            if node is None or node is first:
                break
            yield node, kept
            saved = NORMS.get(type(node).__name__)
            kept = None if saved is None else partial(saved, node)
            given = node.next_functions
            node = given[0][0] if given else None


def _multiplications(convolution: Any) -> int:
    """For each value of its output; 0 where its node does not tell, or does not keep all that it was computed from."""
    if any(convolution._saved_bias_sym_sizes_opt or ()) or convolution._saved_transposed:
        return 0
    weight = convolution.next_functions[1][0]
    if type(weight).__name__ == CAST:  # autocast's
        weight = weight.next_functions[0][0]
    leaf = getattr(weight, "variable", None)
    return 0 if leaf is None else leaf.numel() // leaf.shape[0]


def _again(node: Any) -> Tensor:
    """A convolution's output, computed again from what its node keeps, in the dtype of that."""
    x, where = node._saved_input, (node._saved_stride, node._saved_padding, node._saved_dilation)
    kind = x.device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    as_then = torch.autocast(kind, enabled=False) if casting else nullcontext()
    with torch.no_grad(), as_then:
        return torch.convolution(x, node._saved_weight, None, *where, False, node._saved_output_padding, node._saved_groups)


def _forget(saved: Any, made: Callable[[], Tensor] | None = None) -> None:
    """Replace what a node has saved by what is `made` in the backward, or by a tensor of its shape with any values."""

    def unpack(kept: tuple[Any, ...]) -> Tensor:
        tensor = None if made is None else made()
        if tensor is not None and (tensor.stride(), tensor.dtype) == kept[1:3]:
            return tensor
        empty = torch.empty_strided(kept[0], kept[1], dtype=kept[2], device=kept[3])
        return empty if tensor is None else empty.copy_(tensor)

    try:
        saved.register_hooks(lambda t: (t.shape, t.stride(), t.dtype, t.device), unpack)
    except RuntimeError:
        pass  # other hooks are there, and decide

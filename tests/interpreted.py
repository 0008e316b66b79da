"""The kernels of `rep_backbones.one_pass` run by Triton's interpreter on the CPU, each against the reference; a program for
tests, as Triton reads once how it is to run.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from rep_backbones.one_pass import kernels, proof  # noqa: E402
from rep_backbones.one_pass.function import JointNorm  # noqa: E402

torch.set_num_threads(1)
kernels.PROGRAMS, kernels.TILE, kernels.RUNS = 12, 32, 4  # several runs, tiles that are cut off, and loops, at small sizes

PROOF = (((3, 6, 5, 7), (0, 1, 2)), ((2, 40, 1, 3), (2,)))  # in channels_last the second has more channels than a program


def through_autograd() -> None:
    """A gradient of another layout, frozen parameters, an infinite value."""
    at = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    xs = [torch.sin(at * (index + 1)).requires_grad_(index == 0) for index in range(2)]
    weights = [torch.tensor([1.0, -0.5, 1e-4]).requires_grad_() for _ in xs]
    biases = [torch.zeros(3) for _ in xs]
    y = JointNorm.apply(kernels, len, 1e-3, 2, 2, *xs, *weights, *biases)
    grad = torch.cos(at).contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, [xs[0], *weights], grad)
    norms = [torch.nn.functional.batch_norm(x, None, None, w, b, True, 0, 1e-3) for x, w, b in zip(xs, weights, biases)]
    wanted = torch.autograd.grad(torch.nn.functional.silu(norms[0] + norms[1]), [xs[0], *weights], grad)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    xs = [x.detach().clone() for x in xs]
    xs[0][0, 1, 2, 3] = torch.inf
    y, _ = kernels.forward(xs, [w.detach() for w in weights], biases, 1e-3, 1)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all(), "ReLU hides nothing"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        dtype, counts = getattr(torch, name), (3,) if name == "float32" else (2,)
        proof.compare(kernels, torch.device("cpu"), dtype, counts, PROOF if name == "float32" else PROOF[:1])
    with warnings.catch_warnings(action="ignore"):  # NumPy's, of infinite values
        through_autograd()
    print("the same")

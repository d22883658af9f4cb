"""rms_norm against torch's fused op and the composition that models write; on a GPU, also that compiled, and Liger."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from benchmarks.kernels._step import STEPS, compiled, timed
from r4b_kernels import rms_norm

# Head norms, and the trunks of 4B and (on a GPU) 8B.
SHAPES = on([(1500, 128), (512, 2560)], [(131072, 128), (8192, 2560), (8192, 4096), (4096, 8192)])


def composed(x: Tensor, weight: Tensor) -> Tensor:
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rms_norm(shape: tuple[int, int], step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(size, dtype=DTYPE, requires_grad=True) for size in (shape, shape[1:]))
    grad = torch.randn(shape, dtype=DTYPE)
    torch.testing.assert_close(rms_norm(*inputs), composed(*inputs))
    rivals, skipped = {"torch composed": composed, "F.rms_norm": fused}, {}
    if ON_GPU:
        rivals["torch.compile"] = compiled(composed)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            rivals["Liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
        else:
            skipped["Liger"] = "liger-kernel is not installed"
    passes = 2 if step == "forward" else 3
    contest(
        timed(rms_norm, inputs, grad, step),
        {name: timed(rival, inputs, grad, step) for name, rival in rivals.items()},
        bytes_moved=passes * grad.nbytes,
        flops=4 * passes * grad.numel(),
        skipped=skipped,
    )

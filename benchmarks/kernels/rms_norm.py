"""rms_norm on the CPU, against torch's own fused op and the composition that models write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import rms_norm


def composed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", [(1500, 128), (512, 2560)], ids=["1500x128", "512x2560"])
def test_rms_norm(shape: tuple[int, int], step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[1], requires_grad=True)
    grad = torch.randn(shape)

    def timed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(lambda: function(x, weight))
        return lambda: torch.autograd.grad(function(x, weight), (x, weight), grad)

    torch.testing.assert_close(rms_norm(x, weight), composed(x, weight))
    rivals = {
        "torch composed": timed(composed),
        "F.rms_norm": timed(lambda x, w: F.rms_norm(x, shape[1:], w, 1e-6)),
    }
    passes = 2 if step == "forward" else 5
    contest(timed(rms_norm), rivals, bytes_moved=passes * x.nbytes, flops=4 * passes * x.numel())

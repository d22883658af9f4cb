"""swiglu on the CPU, against the composition that models write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import swiglu


def composed(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", [(1500, 768), (512, 9728)], ids=["1500x768", "512x9728"])
def test_swiglu(shape: tuple[int, int], step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape[0], shape[1] // 2)

    def timed(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(lambda: function(gate_up))
        return lambda: torch.autograd.grad(function(gate_up), gate_up, grad)

    torch.testing.assert_close(swiglu(gate_up), composed(gate_up))
    size = gate_up.nbytes + grad.nbytes
    if step == "forward_backward":
        size += 2 * gate_up.nbytes + grad.nbytes
    contest(timed(swiglu), {"torch composed": timed(composed)}, bytes_moved=size, flops=10 * gate_up.numel())

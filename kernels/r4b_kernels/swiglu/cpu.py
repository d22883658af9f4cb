"""CPU backend of swiglu: both gradients are written straight into the halves of one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(gate_up.dtype).contiguous()


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    exact = gate_up.to(accumulation_dtype(gate_up.dtype))
    grad = grad.to(exact.dtype)
    gate, up = exact.chunk(2, dim=-1)
    result = torch.empty(gate_up.shape, dtype=exact.dtype)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return result.to(gate_up.dtype)


class Backend:
    """The cpu backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)

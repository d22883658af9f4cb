"""The definition of swiglu, in float32, or float64 when given float64."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def forward(gate_up: Tensor) -> Tensor:
    """The op's result; differentiable by autograd."""
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype).contiguous()


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """[..., 2F]: d silu(g)/dg = s (1 + g (1 - s)) with s = sigmoid(g)."""
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    return torch.cat([grad * up * s * (1 + gate * (1 - s)), grad * gate * s], dim=-1).to(gate_up.dtype)


class Backend:
    """The reference backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)

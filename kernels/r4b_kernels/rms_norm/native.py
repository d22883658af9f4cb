"""C++ backend of rms_norm, in float32 (csrc/cpu/rms_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor


class Backend:
    """The native backend."""

    @staticmethod
    def refuses(*tensors: Tensor) -> str | None:
        return next((f"is compiled for float32, got {x.dtype}" for x in tensors if x.dtype != torch.float32), None)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(result, reciprocal root mean square [..., 1])."""
        if weight.dtype == torch.float64:  # the product is float64 then
            out, rstd = Backend.forward(x, torch.ones_like(weight, dtype=torch.float32), eps)
            return out * weight, rstd
        x = x.contiguous()
        out, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
        torch.ops.r4b_native.rms_norm.default(x, weight.to(torch.float32).contiguous(), eps, out, rstd)
        return out, rstd

    @staticmethod
    def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """(grad x, grad weight)."""
        x, grad = x.contiguous(), grad.to(torch.float32).contiguous()
        grad_x, grad_weight = torch.empty_like(x), x.new_empty(weight.shape)
        factor = weight.to(torch.float32).contiguous()
        torch.ops.r4b_native.rms_norm_backward.default(grad, x, factor, rstd, grad_x, grad_weight)
        return grad_x, grad_weight.to(weight.dtype)

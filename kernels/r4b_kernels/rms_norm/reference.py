"""The definition of rms_norm, in float32, or float64 when given float64."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op's result; differentiable by autograd."""
    return forward_with_rstd(x, weight, eps)[0]


def forward_with_rstd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(result, reciprocal root mean square [..., 1])."""
    exact = x.contiguous().to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * (exact * rstd).to(x.dtype), rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(grad x, grad weight): with n = x * rstd, dx = rstd * (g - n * mean(g * n)) for g = grad * weight."""
    dtype = rstd.dtype
    x = x.contiguous()
    normed = x.to(dtype) * rstd
    scaled = grad.to(dtype) * weight.to(dtype)
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    grad_weight = (grad.to(dtype) * normed.to(x.dtype).to(dtype)).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class Backend:
    """The reference backend."""

    forward = staticmethod(forward_with_rstd)
    backward = staticmethod(backward)

"""CPU backend of rms_norm: in-place steps, so that a call makes one temporary instead of four."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(result, reciprocal root mean square [..., 1])."""
    exact = x.contiguous().to(accumulation_dtype(x.dtype))
    work = exact.square()
    rstd = work.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(exact, rstd, out=work)
    normed = work.to(x.dtype)
    return (normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight), rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(grad x, grad weight)."""
    dtype, width = rstd.dtype, x.shape[-1]
    x, grad = x.contiguous(), grad.contiguous().to(dtype)
    normed = x.to(dtype) * rstd
    product = grad * (normed if x.dtype == dtype else normed.to(x.dtype).to(dtype))
    grad_weight = product.reshape(-1, width).sum(0)
    scaled = torch.mul(grad, weight.to(dtype), out=product)
    projection = (scaled * normed).mean(-1, keepdim=True)
    grad_x = scaled.addcmul_(normed, projection, value=-1.0).mul_(rstd)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class Backend:
    """The cpu backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)

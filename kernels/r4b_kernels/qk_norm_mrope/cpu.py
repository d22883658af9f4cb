"""qk_norm_mrope on the CPU: explicit forward and backward, with few passes over memory and one cos/sin table per step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


class Backend:
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        position_ids: Tensor,
        theta: float,
        axes: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, _working_dtype(q.dtype))
        return _one(q, q_weight, cos, sin, eps), _one(k, k_weight, cos, sin, eps)

    @staticmethod
    def backward(
        grad_q: Tensor,
        grad_k: Tensor,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        position_ids: Tensor,
        theta: float,
        axes: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, _working_dtype(q.dtype))
        grad_q, grad_q_weight = _one_backward(grad_q, q, q_weight, cos, sin, eps)
        grad_k, grad_k_weight = _one_backward(grad_k, k, k_weight, cos, sin, eps)
        return grad_q, grad_k, grad_q_weight, grad_k_weight


def _one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    wide = x.to(cos.dtype)
    scaled = (wide * _inverse_rms(wide, eps)).to(x.dtype)
    if weight.dtype == x.dtype:
        scaled.mul_(weight)
    else:
        scaled = (scaled * weight).to(x.dtype)
    return _rotate(scaled.to(cos.dtype), cos, sin, 1.0).to(x.dtype)


def _one_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = x.to(cos.dtype)
    inverse_rms = _inverse_rms(wide, eps)
    normed = wide * inverse_rms
    # A rotation's transpose is the rotation by the negative angle.
    grad_scaled = _rotate(grad.to(cos.dtype), cos, sin, -1.0)
    grad_weight = (grad_scaled * normed).sum(dim=(0, 1))
    grad_scaled.mul_(weight.to(cos.dtype))
    along = torch.linalg.vecdot(grad_scaled, normed)[..., None] / x.shape[-1]
    grad_scaled.addcmul_(normed, along, value=-1.0).mul_(inverse_rms)
    return grad_scaled.to(x.dtype), grad_weight.to(weight.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x, x)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def _tables(
    position_ids: Tensor, theta: float, axes: Sequence[int], half: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    used = position_ids if len(axes) else position_ids[:1]
    positions = used.contiguous().numpy().tobytes()
    return _tables_of(positions, used.dtype, used.shape[0], theta, tuple(axes), half, dtype)


# Keyed by content: every layer of a step, forward and backward, turns by the same angles.
@lru_cache(maxsize=4)
def _tables_of(
    positions: bytes,
    position_dtype: torch.dtype,
    num_axes: int,
    theta: float,
    axes: tuple[int, ...],
    half: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    table = torch.frombuffer(bytearray(positions), dtype=position_dtype) if positions else torch.empty(0)
    table = table.view(num_axes, -1).to(dtype)
    frequency = (theta ** (-torch.arange(half, dtype=torch.float64) / half)).to(dtype)
    angle = (table[list(axes)] if axes else table).T * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""qk_norm_mrope on the CPU: explicit forward and backward, few passes over memory, one cos/sin table per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.qk_norm_mrope.reference import frequencies

BLOCK_ELEMENTS = 131072


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
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, accumulation_dtype(q.dtype))
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
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, accumulation_dtype(q.dtype))
        grad_q, grad_q_weight = _one_backward(grad_q, q, q_weight, cos, sin, eps)
        grad_k, grad_k_weight = _one_backward(grad_k, k, k_weight, cos, sin, eps)
        return grad_q, grad_k, grad_q_weight, grad_k_weight


def _one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    for span in _blocks(x):
        wide = x[span].to(cos.dtype)
        scaled = wide.mul(_inverse_rms(wide, eps)).to(x.dtype).mul(weight).to(x.dtype)
        out[span] = _rotate(scaled.to(cos.dtype), cos[span], sin[span], 1.0)
    return out


def _one_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=cos.dtype)
    wide_weight = weight.to(cos.dtype)
    for span in _blocks(x):
        wide = x[span].to(cos.dtype)
        inverse_rms = _inverse_rms(wide, eps)
        normed = wide * inverse_rms
        # A rotation's transpose is the rotation by the negative angle.
        grad_scaled = _rotate(grad[span].to(cos.dtype), cos[span], sin[span], -1.0)
        grad_weight += (grad_scaled * normed).sum(dim=(0, 1))
        grad_scaled.mul_(wide_weight)
        along = torch.linalg.vecdot(grad_scaled, normed)[..., None].div_(x.shape[-1])
        grad_x[span] = grad_scaled.addcmul_(normed, along, value=-1.0).mul_(inverse_rms)
    return grad_x, grad_weight.to(weight.dtype)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Spans of tokens whose intermediates stay in the cache, and in memory that is reused from block to block."""
    tokens = max(1, BLOCK_ELEMENTS // (x.shape[1] * x.shape[2]))
    return (slice(start, start + tokens) for start in range(0, x.shape[0], tokens))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x, x)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    # Full-width tables and a roll beat arithmetic on the two halves: short strided rows do not vectorise.
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)


def _tables(
    position_ids: Tensor, theta: float, axes: Sequence[int], half: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    used = position_ids if len(axes) else position_ids[:1]
    positions = used.contiguous().numpy().tobytes()
    return _tables_of(positions, used.dtype, used.shape[0], theta, tuple(axes), half, dtype)


# [T, 1, D] each; sin carries the sign of rotate-half. Keyed by content: every layer of a step, forward and backward,
# turns by the same angles.
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
    angle = (table[list(axes)] if axes else table).T * frequencies(2 * half, theta, dtype, table.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=1)[:, None], torch.cat([-sin, sin], dim=1)[:, None]

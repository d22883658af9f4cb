"""The definition of qk_norm_mrope, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def qk_norm_mrope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    theta: float,
    axes: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(q, k), differentiable by autograd. ``axes`` is the position axis of every pair, [] for time everywhere."""
    half = q.shape[-1] // 2
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pair = torch.arange(half, dtype=torch.float64, device=q.device)
    frequency = (theta ** (-pair / half)).to(dtype)
    axis = torch.tensor(list(axes) or [0] * half, device=q.device)
    angle = position_ids[axis].T.to(dtype) * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(dtype)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        first, second = (weight * normed).to(x.dtype).to(dtype).split(half, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


class Backend:
    """Forward and backward as the custom op wants them: the backward is autograd's of the forward above."""

    @staticmethod
    def forward(q, k, q_weight, k_weight, position_ids, theta, axes, eps):
        return qk_norm_mrope(q, k, q_weight, k_weight, position_ids, theta, axes, eps)

    @staticmethod
    def backward(grad_q, grad_k, q, k, q_weight, k_weight, position_ids, theta, axes, eps):
        # func.vjp, because autograd proper does not record inside a custom op.
        settings = (position_ids, theta, axes, eps)
        _, vjp = torch.func.vjp(lambda *inputs: qk_norm_mrope(*inputs, *settings), q, k, q_weight, k_weight)
        return vjp((grad_q, grad_k))

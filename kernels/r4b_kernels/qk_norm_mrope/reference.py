"""The definition of qk_norm_mrope, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


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
    dtype = accumulation_dtype(q.dtype)
    frequency = frequencies(q.shape[-1], theta, dtype, q.device)
    axis = torch.tensor(list(axes) or [0] * half, device=q.device)
    angle = position_ids[axis].T.to(dtype) * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(dtype)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        first, second = (weight * normed).to(x.dtype).to(dtype).split(half, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D/2] radians per position. In float32 for float32 inputs, in the order of operations of transformers: far from
    the start the rounding of a frequency turns into an angle, and training must turn by the angles of the rollouts."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim)


class Backend:
    """Forward and backward as the custom op wants them: the backward is autograd's of the forward above."""

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
        return qk_norm_mrope(q, k, q_weight, k_weight, position_ids, theta, axes, eps)

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
        # func.vjp, because autograd proper does not record inside a custom op.
        vjp = torch.func.vjp(
            lambda *x: qk_norm_mrope(x[0], x[1], x[2], x[3], position_ids, theta, axes, eps), q, k, q_weight, k_weight
        )[1]
        return vjp((grad_q, grad_k))

"""C++ backend of qk_norm_mrope, in float32 (csrc/cpu/qk_norm_mrope.cpp), on the cpu backend's tables of angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r4b_kernels.qk_norm_mrope.cpu import _tables


class Backend:
    """The native backend."""

    @staticmethod
    def refuses(*tensors: Tensor) -> str | None:
        return next((f"is compiled for float32, got {x.dtype}" for x in tensors if x.dtype != torch.float32), None)

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
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, torch.float32)
        outs = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            out = x.new_empty(x.shape)
            torch.ops.r4b_native.norm_rope.default(_rows(x), _weight(weight), cos, sin, eps, out)
            outs.append(out)
        return outs[0], outs[1]

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
        cos, sin = _tables(position_ids, theta, axes, q.shape[-1] // 2, torch.float32)
        grads, weight_grads = [], []
        for grad, x, weight in ((grad_q, q, q_weight), (grad_k, k, k_weight)):
            grad_x, grad_weight = x.new_empty(x.shape), x.new_empty(weight.shape)
            torch.ops.r4b_native.norm_rope_backward.default(
                _rows(grad), _rows(x), _weight(weight), cos, sin, eps, grad_x, grad_weight
            )
            grads.append(grad_x)
            weight_grads.append(grad_weight.to(weight.dtype))
        return grads[0], grads[1], weight_grads[0], weight_grads[1]


def _rows(x: Tensor) -> Tensor:
    """Heads without gaps; tokens and heads may be strided, as slices of one projection are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _weight(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).contiguous()

"""CPU backend of merge_norm: torch's fused LayerNorm with float32 parameters, so that the statistics stay float32."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.merge_norm.reference import check_order, rows_in_order
from r4b_kernels.precision import accumulation_dtype


class Backend:
    """The cpu backend."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(result, mean, reciprocal standard deviation), the last two one value per normalised row."""
        check_order(order, x.shape[0])
        dtype, span = accumulation_dtype(x.dtype), len(weight)
        rows = rows_in_order(x, span, order)
        y, mean, rstd = torch.native_layer_norm(rows, (span,), weight.to(dtype), bias.to(dtype), eps)
        return y.view(x.shape[0] // merge, merge * x.shape[1]), mean.flatten(), rstd.flatten()

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(grad x, [grad weight, grad bias])."""
        span, exact = len(weight), weight.to(mean.dtype)
        rows = rows_in_order(x, span, order)
        grad_rows, *grad_affine = torch.ops.aten.native_layer_norm_backward(
            grad.reshape(rows.shape), rows, (span,), mean[:, None], rstd[:, None], exact, exact, [True] * 3
        )
        grad_rows = grad_rows.view(x.shape)
        grad_x = grad_rows if order is None else torch.empty_like(grad_rows).index_copy_(0, order, grad_rows)
        return grad_x, torch.stack(grad_affine).to(weight.dtype)

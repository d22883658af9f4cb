"""The definition of scatter_vision, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def scatter_vision(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
    """[T, H], differentiable by autograd."""
    dtype = accumulation_dtype(embeddings.dtype)
    tokens = (index >= 0).nonzero().squeeze(1)
    rows = features.to(dtype)[index[tokens].long()]
    if accumulate:
        rows = rows + embeddings.to(dtype)[tokens]
    return embeddings.to(dtype).index_put((tokens,), rows).to(embeddings.dtype)


class Backend:
    """Forward and backward as the custom op wants them: the backward is the transpose of the gather."""

    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        if bool(((index < -1) | (index >= features.shape[0])).any()):
            raise ValueError(f"index must be in -1 .. {features.shape[0] - 1} (rows of features)")
        return scatter_vision(embeddings, features, index, accumulate)

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int) -> Tensor:
        # func.vjp, because autograd proper does not record inside a custom op.
        features, zeros = grad_out.new_zeros(num_features, grad_out.shape[1]), torch.zeros_like(grad_out)
        vjp = torch.func.vjp(lambda x: scatter_vision(zeros, x, index, accumulate=False), features)[1]
        return vjp(grad_out)[0]

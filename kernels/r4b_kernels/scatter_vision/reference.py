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
    """Forward and backward as the custom op wants them: the backward is autograd's of the forward above."""

    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        if bool(((index < -1) | (index >= features.shape[0])).any()):
            raise ValueError(f"index must be in -1 .. {features.shape[0] - 1} (rows of features)")
        return scatter_vision(embeddings, features, index, accumulate)

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool) -> tuple[Tensor, Tensor]:
        # func.vjp, because autograd proper does not record inside a custom op.
        embeddings, features = torch.zeros_like(grad_out), grad_out.new_zeros(num_features, grad_out.shape[1])
        vjp = torch.func.vjp(lambda *x: scatter_vision(x[0], x[1], index, accumulate), embeddings, features)[1]
        grad_embeddings, grad_features = vjp(grad_out)
        return grad_out.new_empty(0) if accumulate else grad_embeddings, grad_features

"""C++ backend of scatter_vision, in float32 (csrc/cpu/scatter_vision.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.scatter_vision.cpu import _check_range


class Backend:
    """The native backend."""

    @staticmethod
    def refuses(*tensors: Tensor) -> str | None:
        return next((f"is compiled for float32, got {x.dtype}" for x in tensors if x.dtype != torch.float32), None)

    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        _check_range(index, features.shape[0])
        out = embeddings.new_empty(embeddings.shape)
        torch.ops.r4b_native.scatter_vision.default(
            embeddings.contiguous(), features.contiguous(), _rows(index), accumulate, out
        )
        return out

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool) -> tuple[Tensor, Tensor]:
        grad_embeddings = grad_out.new_empty(0 if accumulate else grad_out.shape)
        grad_features = grad_out.new_empty((num_features, grad_out.shape[1]))
        torch.ops.r4b_native.scatter_vision_backward.default(
            grad_out.contiguous(), _rows(index), accumulate, grad_embeddings, grad_features
        )
        return grad_embeddings, grad_features


def _rows(index: Tensor) -> Tensor:
    return index.to(torch.int64).contiguous()

"""scatter_vision on the CPU: one indexed copy each way, without boolean masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


class Backend:
    """Forward and backward as the custom op wants them."""

    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        _check_range(index, features.shape[0])
        tokens, rows, each_once = _used(index, features.shape[0])
        values = features if each_once else features.index_select(0, rows)
        out = embeddings.clone(memory_format=torch.contiguous_format)
        return out.index_add_(0, tokens, values) if accumulate else out.index_copy_(0, tokens, values)

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool) -> tuple[Tensor, Tensor]:
        tokens, rows, each_once = _used(index, num_features)
        if accumulate:
            grad_embeddings = grad_out.new_empty(0)
        else:
            grad_embeddings = grad_out.clone(memory_format=torch.contiguous_format).index_fill_(0, tokens, 0)
        grad_features = grad_out.index_select(0, tokens)
        if not each_once:
            # Several tokens may add into one row: sum in float32, in token order.
            dtype = accumulation_dtype(grad_out.dtype)
            total = torch.zeros((num_features, grad_out.shape[1]), dtype=dtype)
            grad_features = total.index_add_(0, rows, grad_features.to(dtype)).to(grad_out.dtype)
        return grad_embeddings, grad_features


def _check_range(index: Tensor, num_features: int) -> None:
    if not index.numel():
        return
    low, high = (int(x) for x in index.aminmax())
    if low < -1 or high >= num_features:
        raise ValueError(
            f"index holds {low if low < -1 else high}: entries must be -1 or a row of features, 0 .. {num_features - 1}"
        )


def _used(index: Tensor, num_features: int) -> tuple[Tensor, Tensor, bool]:
    """(tokens [M], rows [M], whether the rows are 0, 1, ..., P-1: the usual case, which needs no gather and no sum)."""
    host = index.numpy()
    tokens = np.flatnonzero(host >= 0)
    rows = host[tokens].astype(np.int64)
    each_once = np.array_equal(rows, np.arange(num_features))
    return torch.from_numpy(tokens), torch.from_numpy(rows), each_once

"""scatter_vision on the CPU: an image's tokens are a run of rows, so most of the work is a few block copies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype

# Runs shorter than this on average are cheaper as one indexed copy.
MIN_MEAN_RUN = 8


class Backend:
    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        _check_range(index, features.shape[0])
        out = embeddings.clone(memory_format=torch.contiguous_format)
        tokens, rows, runs = _runs(index)
        if runs is None:
            values = features.index_select(0, rows)
            return out.index_add_(0, tokens, values) if accumulate else out.index_copy_(0, tokens, values)
        for token, row, count in runs:
            if accumulate:
                out[token : token + count] += features[row : row + count]
            else:
                out[token : token + count] = features[row : row + count]
        return out

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int) -> Tensor:
        # Several tokens may add into one row: sum in float32, in token order.
        dtype = accumulation_dtype(grad_out.dtype)
        grad = torch.zeros((num_features, grad_out.shape[1]), dtype=dtype)
        tokens, rows, runs = _runs(index)
        if runs is None:
            grad.index_add_(0, rows, grad_out.index_select(0, tokens).to(dtype))
        else:
            for token, row, count in runs:
                grad[row : row + count] += grad_out[token : token + count]
        return grad.to(grad_out.dtype)


def _check_range(index: Tensor, num_features: int) -> None:
    if not index.numel():
        return
    low, high = (int(x) for x in index.aminmax())
    if low < -1 or high >= num_features:
        raise ValueError(
            f"index holds {low if low < -1 else high}: entries must be -1 or a row of features, 0 .. {num_features - 1}"
        )


def _runs(index: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int, int]] | None]:
    """(tokens [M], rows [M], runs): a run is (first token, first row, count), both ascending by one; None if short."""
    host = index.numpy()
    tokens = np.flatnonzero(host >= 0)
    rows = host[tokens].astype(np.int64)
    breaks = np.flatnonzero((np.diff(tokens) != 1) | (np.diff(rows) != 1)) + 1
    runs = None
    if (len(breaks) + 1) * MIN_MEAN_RUN <= max(len(tokens), MIN_MEAN_RUN):
        first = np.concatenate([[0], breaks]) if len(tokens) else breaks
        count = np.diff(np.append(first, len(tokens)))
        runs = list(zip(tokens[first].tolist(), rows[first].tolist(), count.tolist(), strict=True))
    return torch.from_numpy(tokens), torch.from_numpy(rows), runs

"""CPU backend of linear_logprob: chunks of rows in two reused buffers; the backward recomputes the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import (
    RowStatistics,
    check_target_range,
    group_of,
    merge_shards,
    shard_start,
    sum_over,
)

# Logits of one chunk: small enough for the last-level cache, with enough rows to feed a GEMM. Fixed, so that results
# repeat bit by bit.
_CHUNK_ELEMENTS = 1 << 21
_MIN_ROWS = 64


class ChunkBuffers:
    """Two [rows, V] workspaces in the accumulation dtype, allocated once per call."""

    def __init__(self, num_rows: int, hidden: Tensor, weight: Tensor) -> None:
        self.vocabulary = weight.shape[0]
        self.rows = min(num_rows, max(_MIN_ROWS, _CHUNK_ELEMENTS // self.vocabulary))
        dtype = accumulation_dtype(hidden.dtype)
        self._logits = torch.empty(self.rows, self.vocabulary, dtype=dtype)
        self._exp = torch.empty(self.rows, self.vocabulary, dtype=dtype)

    def chunks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, max(1, self.rows)):
            yield slice(start, min(start + self.rows, num_rows))

    def logits(self, hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        z = self._logits[: hidden.shape[0]]
        if hidden.dtype == z.dtype:
            torch.mm(hidden, weight.T, out=z)
        else:
            z.copy_(torch.mm(hidden, weight.T))
        return z if temperature == 1.0 else z.mul_(1.0 / temperature)

    def exp(self, z: Tensor) -> Tensor:
        return torch.exp(z, out=self._exp[: z.shape[0]])


def local_columns(target: Tensor, weight: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(column of the target in this shard, clamped into it; whether it really lies there), both [rows, 1]."""
    column = (target - start)[:, None]
    inside = (column >= 0) & (column < weight.shape[0])
    return column.clamp(0, weight.shape[0] - 1), inside


def reduce_rows(
    z: Tensor, target: Tensor, weight: Tensor, start: int, buffers: ChunkBuffers
) -> tuple[RowStatistics, Tensor]:
    """(this shard's RowStatistics, exp(z - max) in a buffer). Overwrites z."""
    column, inside = local_columns(target, weight, start)
    target_logit = z.gather(1, column).masked_fill_(~inside, 0.0).squeeze(1)
    maximum = z.amax(-1)
    z.sub_(maximum[:, None])
    exp = buffers.exp(z)
    weighted = z.mul_(exp).sum(-1)
    return RowStatistics(maximum, exp.sum(-1), weighted, target_logit), exp


class RowSubset:
    """The rows where ``mask`` holds, in chunks: slices where it holds everywhere, so that nothing is copied."""

    def __init__(self, mask: Tensor) -> None:
        self.index = None if bool(mask.all()) else mask.nonzero().squeeze(1)
        self.count = mask.numel() if self.index is None else self.index.numel()

    def __getitem__(self, chunk: slice) -> slice | Tensor:
        return chunk if self.index is None else self.index[chunk]


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp), each [T]."""
    ranks = group_of(group)
    check_target_range(target, weight.shape[0], ranks)
    rows = RowSubset(target >= 0)
    start = shard_start(weight.shape[0], ranks)
    buffers = ChunkBuffers(rows.count, hidden, weight)
    statistics = torch.empty(4, rows.count, dtype=accumulation_dtype(hidden.dtype))
    for chunk in buffers.chunks(rows.count):
        index = rows[chunk]
        z = buffers.logits(hidden[index], weight, temperature)
        local, _ = reduce_rows(z, target[index], weight, start, buffers)
        torch.stack(local, out=statistics[:, chunk])
    whole = merge_shards(RowStatistics(*statistics.unbind()), ranks)
    results = (whole.logprob, whole.entropy, whole.logsumexp)
    if rows.index is None:
        return results
    logprob, entropy, logsumexp = (
        torch.zeros(target.shape, dtype=r.dtype).index_copy_(0, rows.index, r) for r in results
    )
    return logprob, entropy, logsumexp


def backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Rows that are masked, or whose incoming gradients are zero, get no GEMM."""
    ranks = group_of(group)
    dtype = logsumexp.dtype
    live = target >= 0
    touched = torch.zeros_like(live)
    for grad in (grad_logprob, grad_entropy):
        if grad is not None:
            touched |= grad != 0
    rows = RowSubset(live & touched)
    start = shard_start(weight.shape[0], ranks)
    accumulator = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    buffers = ChunkBuffers(rows.count, hidden, weight)
    for chunk in buffers.chunks(rows.count):
        index = rows[chunk]
        chunk_hidden = hidden[index]
        z = buffers.logits(chunk_hidden, weight, temperature)
        log_p = z.sub_(logsumexp[index][:, None])
        grad_z = buffers.exp(log_p)
        column, inside = local_columns(target[index], weight, start)
        scale = z.new_zeros(z.shape[0], 1) if grad_logprob is None else grad_logprob[index].to(dtype)[:, None]
        if grad_entropy is None:
            grad_z.mul_(-scale)
        else:
            slope = grad_entropy[index].to(dtype)[:, None]
            log_p.add_(entropy[index][:, None]).mul_(slope).add_(scale)
            grad_z.mul_(log_p).neg_()
        grad_z.scatter_add_(1, column, scale * inside)
        accumulator.add(index, grad_z.mul_(1.0 / temperature) if temperature != 1.0 else grad_z, chunk_hidden)
    return accumulator.result(ranks)


class GradientAccumulator:
    """Sums chunks of logit gradients into hidden's and weight's; the weight's sum is kept in float32 (or float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> None:
        self.weight = weight
        self.dtype = hidden.dtype
        self.grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype) if need_hidden else None
        accumulate = accumulation_dtype(weight.dtype)
        self.grad_weight = torch.zeros(weight.shape, dtype=accumulate) if need_weight else None

    def add(self, index: slice | Tensor, grad_z: Tensor, hidden: Tensor) -> None:
        grad_z = grad_z.to(self.dtype)
        if self.grad_hidden is not None:
            if isinstance(index, slice):
                torch.mm(grad_z, self.weight, out=self.grad_hidden[index])
            else:
                self.grad_hidden.index_copy_(0, index, grad_z @ self.weight)
        if self.grad_weight is not None:
            if self.grad_weight.dtype == self.dtype:
                self.grad_weight.addmm_(grad_z.T, hidden)
            else:
                self.grad_weight.add_(grad_z.T @ hidden)

    def exact_result(self, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """(grad hidden, summed over the ranks; grad weight in the accumulation dtype); empty where not asked for."""
        grad_hidden = self.weight.new_empty(0) if self.grad_hidden is None else sum_over(self.grad_hidden, ranks)
        grad_weight = self.grad_weight
        if grad_weight is None:
            grad_weight = self.weight.new_empty(0, dtype=accumulation_dtype(self.dtype))
        return grad_hidden, grad_weight

    def result(self, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The same, with grad weight rounded to weight's dtype."""
        grad_hidden, grad_weight = self.exact_result(ranks)
        return grad_hidden, grad_weight.to(self.weight.dtype)


class Backend:
    """The cpu backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)

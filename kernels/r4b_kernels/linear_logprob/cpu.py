"""CPU backend of linear_logprob: chunks of rows in two reused buffers; the backward recomputes the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, local_columns, split_rows
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import RowStatistics, check_target_range, group_of, merge_shards, shard_start


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


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp), each [T]."""
    ranks = group_of(group)
    check_target_range(target, weight.shape[0], ranks)
    (rows,) = split_rows(target >= 0)
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
    (rows,) = split_rows(live & touched)
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


class Backend:
    """The cpu backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)

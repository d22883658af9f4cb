"""CPU backend of policy_loss_head: chunk by chunk the logits become their own gradient: three matrix products.

Rows that can have a gradient come first and are the only ones to take part in the backward products; among them the
rows whose ratio turns out clipped are dropped before those products, chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, RowSubset, local_columns, split_rows
from r4b_kernels.linear_logprob.cpu import reduce_rows
from r4b_kernels.policy_loss_head.reference import Objective, Rows, row_gradient, row_terms
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import check_target_range, group_of, merge_shards, shard_start

# Above this share of rows with a gradient, copying them together costs more than their products save.
_COMPACT_BELOW = 0.9


def forward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    objective: Objective,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """(loss, logprob, entropy, ratio, kl, clipped, d loss / d hidden, d loss / d weight)."""
    ranks = group_of(group)
    check_target_range(rows.target, weight.shape[0], ranks)
    start = shard_start(weight.shape[0], ranks)
    dtype = accumulation_dtype(hidden.dtype)
    logprob = torch.zeros(rows.target.shape, dtype=dtype)
    entropy = torch.zeros(rows.target.shape, dtype=dtype)
    accumulator = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    live, idle = live_and_idle(rows, objective, need_hidden or need_weight)
    buffers = ChunkBuffers(max(live.count, idle.count), hidden, weight)
    for part, with_gradient in ((live, True), (idle, False)):
        for chunk in buffers.chunks(part.count):
            index = part[chunk]
            chunk_hidden, chunk_rows = hidden[index], rows.at(index)
            z = buffers.logits(chunk_hidden, weight, objective.temperature)
            local, exp = reduce_rows(z, chunk_rows.target, weight, start, buffers)
            whole = merge_shards(local, ranks)
            logprob[index] = whole.logprob
            entropy[index] = whole.entropy
            if not with_gradient:
                continue
            slope = row_gradient(whole.logprob, chunk_rows, objective)
            kept = slope.nonzero().squeeze(1)
            if kept.numel() == 0:
                continue
            if kept.numel() < _COMPACT_BELOW * slope.numel():
                index = kept + index.start if isinstance(index, slice) else index[kept]
                exp, slope, chunk_hidden = exp[kept], slope[kept], chunk_hidden[kept]
                chunk_rows = chunk_rows.at(kept)
                whole, local = (type(s)(*(value[kept] for value in s)) for s in (whole, local))
            slope = (slope / objective.temperature)[:, None]
            softmax_scale = torch.exp(local.maximum - whole.maximum) / whole.total
            grad_z = exp.mul_(-slope * softmax_scale[:, None])
            column, inside = local_columns(chunk_rows.target, weight, start)
            grad_z.scatter_add_(1, column, slope * inside)
            accumulator.add(index, grad_z, chunk_hidden)
    terms = row_terms(logprob, rows, objective)
    grad_hidden, grad_weight = accumulator.exact_result(ranks)
    return terms.loss.sum(), logprob, entropy, terms.ratio, terms.kl, terms.clipped, grad_hidden, grad_weight


def live_and_idle(rows: Rows, objective: Objective, training: bool) -> list[RowSubset]:
    """(rows that may have a gradient, valid rows that cannot)."""
    valid = rows.target >= 0
    live = rows.has_loss & training
    if not objective.kl_coef:
        live &= rows.advantage != 0
    return split_rows(live, valid & ~live)

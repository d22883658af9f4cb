"""Triton backend of linear_logprob: matrix products by cuBLAS, and one pass over each chunk of logits between them.

A program takes one row, from its left to its right. A row is at most 600 KB and a chunk has over a thousand of them, so
rows alone fill a GPU; in short batches reading the weight takes longer than a row does. Sums run in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, narrow_view, split_rows
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator
from r4b_kernels.vocabulary import RowStatistics, group_of, merge_shards, shard_start, vocabulary_size

BLOCK = 4096
WARPS = 8
# exp(16) fits every dtype with float32's exponent; a row whose maximum is further above its offset is scaled again.
SLACK = 16.0


def reduce_rows(
    z: Tensor, target: Tensor, start: int, vocabulary: int, powers: Tensor | None = None
) -> tuple[RowStatistics, Tensor]:
    """This shard's RowStatistics of some rows, in one pass over their logits.

    Args:
        z: logits [rows, V], float32 or float64, rows of unit stride.
        target: int64 [rows], ids in the whole vocabulary; one beyond it makes the row's statistics NaN.
        start: the id of the first column.
        vocabulary: the number of ids.
        powers: receives exp(z - offset), [rows, V]; may be ``narrow_view(z, ...)``. Not float16: too narrow a range.

    Returns:
        (statistics, offset [rows]). An offset is at most SLACK below the row's maximum here, and never above it.
    """
    rows, columns = z.shape
    statistics = z.new_empty(5, rows)
    if rows:
        _reduce[rows,](
            z,
            z if powers is None else powers,
            target,
            statistics,
            rows,
            columns,
            start,
            vocabulary,
            z.stride(0),
            0 if powers is None else powers.stride(0),
            STORE=powers is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
            SLACK=SLACK,
            ACC=accumulator(z.dtype),
            num_warps=WARPS,
        )
    *local, offset = statistics.unbind()
    return RowStatistics(*local), offset


def differentiate_rows(
    z: Tensor,
    grad_z: Tensor,
    target: Tensor,
    start: int,
    vocabulary: int,
    logsumexp: Tensor,
    grad_logprob: Tensor,
    entropy: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> Tensor:
    """grad_z = grad_logprob (onehot - p) - grad_entropy p (log p + entropy), in one pass over the logits z.

    ``grad_z`` [rows, V] may be ``narrow_view(z, ...)``; the rest is as in ``reduce_rows``, per row [rows] in z's dtype.
    """
    rows, columns = z.shape
    if rows:
        _differentiate[rows,](
            z,
            grad_z,
            target,
            logsumexp,
            grad_logprob,
            logsumexp if entropy is None else entropy,
            grad_logprob if grad_entropy is None else grad_entropy,
            columns,
            start,
            vocabulary,
            z.stride(0),
            grad_z.stride(0),
            ENTROPY=grad_entropy is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
            ACC=accumulator(z.dtype),
            num_warps=WARPS,
        )
    return grad_z


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp), each [T]."""
    ranks = group_of(group)
    start, vocabulary = shard_start(weight.shape[0], ranks), vocabulary_size(weight.shape[0], ranks)
    (rows,) = split_rows(target >= 0)
    buffers = ChunkBuffers(rows.count, hidden, weight)
    statistics = hidden.new_empty(4, rows.count, dtype=accumulation_dtype(hidden.dtype))
    for chunk in buffers.chunks(rows.count):
        index = rows[chunk]
        z = buffers.logits(hidden[index], weight, temperature)
        local, _ = reduce_rows(z, target[index].contiguous(), start, vocabulary)
        torch.stack(local, out=statistics[:, chunk])
    whole = merge_shards(RowStatistics(*statistics.unbind()), ranks)
    results = (whole.logprob, whole.entropy, whole.logsumexp)
    if rows.index is None:
        return results
    logprob, entropy, logsumexp = (r.new_zeros(target.shape).index_copy_(0, rows.index, r) for r in results)
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
    """Rows that are masked, or whose incoming gradients are zero, get no product."""
    ranks = group_of(group)
    start, vocabulary = shard_start(weight.shape[0], ranks), vocabulary_size(weight.shape[0], ranks)
    touched = torch.zeros_like(target, dtype=torch.bool)
    for grad in (grad_logprob, grad_entropy):
        if grad is not None:
            touched |= grad != 0
    (rows,) = split_rows((target >= 0) & touched)
    by_logprob, by_entropy = (
        None if grad is None else grad.to(logsumexp.dtype) / temperature for grad in (grad_logprob, grad_entropy)
    )
    by_logprob = torch.zeros_like(logsumexp) if by_logprob is None else by_logprob
    accumulator = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    buffers = ChunkBuffers(rows.count, hidden, weight)
    for chunk in buffers.chunks(rows.count):
        index = rows[chunk]
        chunk_hidden = hidden[index]
        z = buffers.logits(chunk_hidden, weight, temperature)
        grad_z = differentiate_rows(
            z,
            narrow_view(z, hidden.dtype),
            target[index].contiguous(),
            start,
            vocabulary,
            logsumexp[index].contiguous(),
            by_logprob[index].contiguous(),
            entropy[index].contiguous(),
            None if by_entropy is None else by_entropy[index].contiguous(),
        )
        accumulator.add(index, grad_z, chunk_hidden)
    return accumulator.result(ranks)


class Backend:
    """The triton backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)


@triton.jit(do_not_specialize=["rows"])
def _reduce(
    z,
    powers,
    target,
    statistics,
    rows,
    columns,
    start,
    vocabulary,
    z_stride,
    powers_stride,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLACK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    powers += row * powers_stride
    lane = tl.arange(0, BLOCK)
    label = tl.load(target + row)
    inside = (label >= start) & (label < start + columns)
    wanted = tl.load(z + tl.where(inside, label - start, 0), mask=inside, other=0.0)
    # The target of a sampled row is likely, so that an offset no less than its logit seldom has to move.
    offset = tl.max(tl.load(z + lane, mask=lane < columns, other=float("-inf")), 0)
    offset = tl.where(inside, tl.maximum(offset, wanted), offset)
    maximum = offset
    total = tl.zeros([BLOCK], ACC)
    weighted = tl.zeros([BLOCK], ACC)
    for begin in range(0, columns, BLOCK):
        column = begin + lane
        value = tl.load(z + column, mask=column < columns, other=float("-inf"))
        peak = tl.max(value, 0)
        if peak > offset + SLACK:
            shift = offset - peak
            factor = tl.exp(shift)
            weighted = (weighted + total * shift) * factor
            total = total * factor
            if STORE:
                tl.debug_barrier()
                for earlier in range(0, begin, BLOCK):
                    power = tl.load(powers + earlier + lane).to(ACC) * factor
                    tl.store(powers + earlier + lane, power.to(powers.dtype.element_ty))
            offset = peak
        maximum = tl.maximum(maximum, peak)
        distance = value - offset
        power = tl.exp(distance)
        total += power
        # The bound keeps 0 * -inf out, beyond the last column.
        weighted += power * tl.maximum(distance, -1000.0)
        if STORE:
            # powers may lie over z: no thread writes before all have read.
            tl.debug_barrier()
            tl.store(powers + column, power.to(powers.dtype.element_ty), mask=column < columns)
    shift = offset - maximum
    factor = tl.exp(shift)
    total_here = tl.sum(total, 0)
    weighted_here = (tl.sum(weighted, 0) + total_here * shift) * factor
    tl.store(statistics + row, maximum)
    tl.store(statistics + rows + row, total_here * factor)
    tl.store(statistics + 2 * rows + row, weighted_here)
    tl.store(statistics + 3 * rows + row, tl.where(label < vocabulary, wanted, float("nan")))
    tl.store(statistics + 4 * rows + row, offset)


@triton.jit
def _differentiate(
    z,
    grad_z,
    target,
    logsumexp,
    grad_logprob,
    entropy,
    grad_entropy,
    columns,
    start,
    vocabulary,
    z_stride,
    grad_stride,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    grad_z += row * grad_stride
    lane = tl.arange(0, BLOCK)
    label = tl.load(target + row)
    offset = tl.load(logsumexp + row)
    by_logprob = tl.where(label < vocabulary, tl.load(grad_logprob + row), float("nan"))
    if ENTROPY:
        by_entropy = tl.load(grad_entropy + row)
        base = by_logprob + by_entropy * tl.load(entropy + row)
    for begin in range(0, columns, BLOCK):
        column = begin + lane
        log_p = tl.load(z + column, mask=column < columns, other=0.0) - offset
        slope = by_logprob
        if ENTROPY:
            slope = base + by_entropy * log_p
        gradient = tl.where(column + start == label, by_logprob, 0.0) - tl.exp(log_p) * slope
        # grad_z may lie over z: no thread writes before all have read.
        tl.debug_barrier()
        tl.store(grad_z + column, gradient.to(grad_z.dtype.element_ty), mask=column < columns)

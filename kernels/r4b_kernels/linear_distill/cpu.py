"""CPU backend of linear_distill: chunk by chunk the logits become their own gradient: three matrix products.

Without a tail only the listed columns of the vocabulary matter, so where they are few their rows of the weight are
gathered instead, and there is no product with the whole vocabulary at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, RowSubset, split_rows
from r4b_kernels.linear_distill.reference import Objective, Rows, check_rows, row_terms
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import RowStatistics, group_of, merge_shards, shard_start, sum_over, vocabulary_size

# Stands in for -inf in the columns of listed ids: its exponential is 0, and so is 0 times it. A shard with nothing else
# has this as its maximum, and so no part in the sums over shards.
_OUT = -1e30
# A gathered row of the weight costs about as much as this many rows in a matrix product (measured with 16 and 64 ids).
_GATHER_COST = 48
# Elements of the gathered weight of one chunk.
_GATHER_ELEMENTS = 1 << 20


class Shard:
    """The part of the vocabulary that this rank holds.

    Attributes:
        size: ids in this shard.
        start: the first of them.
        ranks: the group that holds all shards; None for one shard.
        vocabulary: ids in all shards.
    """

    def __init__(self, weight: Tensor, group: str | None) -> None:
        self.size = weight.shape[0]
        self.ranks = group_of(group)
        self.start = shard_start(self.size, self.ranks)
        self.vocabulary = vocabulary_size(self.size, self.ranks)

    def sum(self, tensor: Tensor) -> Tensor:
        return sum_over(tensor, self.ranks)

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column here of each id [T, K], which of them this shard holds)."""
        column = ids - self.start
        return column, (ids >= 0) & (column >= 0) & (column < self.size)


def gathers(slots: int, shard: Shard, objective: Objective) -> bool:
    """Whether to gather the listed rows of the weight instead of multiplying with all of it."""
    return not objective.tail and _GATHER_COST * slots <= shard.vocabulary


def forward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    objective: Objective,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """(loss, divergence, teacher mass, student mass, entropy, d loss / d hidden, d loss / d weight)."""
    shard = Shard(weight, group)
    check_rows(rows, shard.vocabulary, objective)
    (live,) = split_rows(rows.live)
    results = torch.zeros(4, hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))

    def reduce(index: slice | Tensor, rows: Rows, listed: Tensor, rest: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Puts a chunk's results where they belong; gives the slope of the loss by its bucket logits."""
        terms = row_terms(listed, rest, rows, shard.vocabulary, objective)
        results[:, index] = torch.stack(terms[:4])
        return terms.slope.mul_((rows.row_weight / objective.temperature)[:, None])

    walk = _gathered if gathers(rows.ids.shape[1], shard, objective) else _dense
    gradients = walk(hidden, weight, rows, live, shard, objective, reduce, need_hidden, need_weight)
    loss = torch.where(rows.live, rows.row_weight * results[0], 0.0).sum()
    return loss, *(value.clone() for value in results), *gradients


def _dense(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    live: RowSubset,
    shard: Shard,
    objective: Objective,
    reduce: Callable[..., Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad hidden, grad weight), by products with the whole shard."""
    accumulator = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    buffers = ChunkBuffers(live.count, hidden, weight)
    for chunk in buffers.chunks(live.count):
        index = live[chunk]
        chunk_hidden, chunk_rows = hidden[index], rows.at(index)
        z = buffers.logits(chunk_hidden, weight, objective.temperature)
        column, inside = shard.columns(chunk_rows.ids)
        slots = inside.flatten().nonzero().squeeze(1)
        place = (torch.arange(z.shape[0])[:, None] * shard.size + column).flatten()[slots]
        listed = z.new_zeros(inside.numel()).index_copy_(0, slots, z.view(-1)[place])
        listed = shard.sum(listed.view(inside.shape))
        if objective.tail:
            z.view(-1).index_fill_(0, place, _OUT)
            exp, share, rest = _reduce_rest(z, buffers, shard.ranks)
            slope = reduce(index, chunk_rows, listed, rest)
            grad_z = exp.mul_((share * slope[:, -1])[:, None])
        else:
            slope = reduce(index, chunk_rows, listed)
            grad_z = z.zero_()
        if need_hidden or need_weight:
            grad_z.view(-1).index_copy_(0, place, slope[:, : inside.shape[1]].flatten()[slots])
            accumulator.add(index, grad_z, chunk_hidden)
    return accumulator.exact_result(shard.ranks)


def _reduce_rest(
    z: Tensor, buffers: ChunkBuffers, ranks: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What the logits of the ids that are not listed come to, over all shards. Overwrites z [T, V].

    Returns:
        exp(z - this shard's maximum) [T, V]; what makes it the softmax over the others, [T]; and, [T] each, logsumexp
        over the others and the entropy of that softmax.
    """
    maximum = z.amax(1)
    exp = buffers.exp(z.sub_(maximum[:, None]))
    total = exp.sum(1)
    weighted = z.mul_(exp).sum(1)
    whole = merge_shards(RowStatistics(maximum, total, weighted, torch.zeros_like(total)), ranks)
    share = (maximum - whole.maximum).exp() / whole.total
    return exp, share, (whole.logsumexp, whole.entropy)


def _gathered(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    live: RowSubset,
    shard: Shard,
    objective: Objective,
    reduce: Callable[..., Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad hidden, grad weight), by products with the listed rows of the weight alone."""
    dtype = accumulation_dtype(hidden.dtype)
    grad_hidden = torch.zeros(hidden.shape if need_hidden else 0, dtype=dtype)
    grad_weight = torch.zeros(weight.shape if need_weight else 0, dtype=dtype)
    for chunk in _gather_chunks(live.count, rows.ids.shape[1] * hidden.shape[1]):
        index = live[chunk]
        chunk_hidden, chunk_rows = hidden[index].to(dtype), rows.at(index)
        column, inside = shard.columns(chunk_rows.ids)
        gathered = weight[column.masked_fill(~inside, 0)].to(dtype)
        listed = torch.bmm(gathered, chunk_hidden[:, :, None]).squeeze(2) / objective.temperature
        listed = shard.sum(listed.masked_fill_(~inside, 0.0))
        slope = reduce(index, chunk_rows, listed).masked_fill_(~inside, 0.0)
        if need_hidden:
            grad_hidden[index] = torch.bmm(slope[:, None, :], gathered).squeeze(1)
        if need_weight:
            row, slot = inside.nonzero(as_tuple=True)
            grad_weight.index_add_(0, column[row, slot], chunk_hidden[row].mul_(slope[row, slot, None]))
    return shard.sum(grad_hidden).to(hidden.dtype), grad_weight


def _gather_chunks(num_rows: int, elements: int) -> Iterator[slice]:
    step = max(1, _GATHER_ELEMENTS // max(1, elements))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


class Backend:
    """The cpu backend."""

    forward = staticmethod(forward)

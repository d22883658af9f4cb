"""Triton backend of linear_distill: matrix products by cuBLAS, one pass over each chunk of logits, and K-wide kernels.

With a tail, the listed logits of a row are taken out of the chunk; one pass turns the others into exp(z - c), c being
the row's offset, while it sums them. Then the slopes g of the buckets are known, and the gradient of the logits is

    dz = row_weight / temperature * i * (exp(z - c) at the others, g_k / i at id k),   i = g_0 exp(c - logsumexp)

so that K elements a row are written back, and a factor per row goes to the small operand of each backward product. The
logits are read once and written once, in half precision. Where i is too small to divide by (the tail's slope may be 0)
a harmless larger one takes its place: see LEAST.

Without a tail there is no product with the vocabulary: K rows of the weight are gathered per row of hidden, and the
weight's gradient is summed id by id, in the order of the rows. Ids of a row are distinct, so no two lanes write to one
place, and nothing needs an atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, RowSubset, narrow_view, split_rows
from r4b_kernels.linear_distill.cpu import Shard
from r4b_kernels.linear_distill.reference import TAIL_FLOOR, Objective, Rows
from r4b_kernels.linear_logprob.triton import differentiate_rows, reduce_rows
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator
from r4b_kernels.vocabulary import merge_shards

MAX_SLOTS = 1024
# |i| is at least this times the row's largest |g_k|. Elements g_k / i stay below 1e22, and what a too large i adds to
# the others' gradients, at most exp(16) LEAST of that largest, is far below what the accumulation dtype resolves.
LEAST = {torch.float32: 2.0**-72, torch.float64: 2.0**-300}
# Stands in for -inf in the columns of listed ids: reduce_rows makes 0 of it. See the cpu backend's.
OUT = tl.constexpr(-1e30)
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CODES = {"forward_kl": FORWARD.value, "reverse_kl": REVERSE.value, "jsd": JSD.value}
FLOOR = tl.constexpr(TAIL_FLOOR)


class Results:
    """Loss, divergence, teacher mass, student mass and entropy per row, [5, T]; ``score`` fills in the live ones."""

    def __init__(self, rows: Rows, live: RowSubset, shard: Shard, objective: Objective, dtype: torch.dtype) -> None:
        self.rows = rows
        self.live = live
        self.shard = shard
        self.objective = objective
        self.values = torch.zeros(5, rows.ids.shape[0], dtype=dtype, device=rows.ids.device)

    def score(
        self, chunk: slice, listed: Tensor, rest: tuple[Tensor, Tensor, Tensor] | None, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Fill in the rows ``live[chunk]``.

        Args:
            chunk: which of the live rows.
            listed: [rows, K], the student's logits of the ids.
            rest: (maximum, sum of exp(z - maximum), the same weighted with z - maximum) of the other logits, [rows]
                each; with a tail.
            offset: [rows], if the others hold exp(z - offset).

        Returns:
            (what to write at the ids [rows, K], what to multiply the row's others with [rows]); with ``offset`` the
            second is for the whole row.
        """
        count, slots = listed.shape
        slope, index = torch.empty_like(listed), self.live[chunk]
        scale = self.rows.row_weight[index] / self.objective.temperature
        maximum, total, weighted = (scale, scale, scale) if rest is None else rest
        block = triton.next_power_of_2(slots)
        _score[count,](
            listed,
            maximum,
            total,
            weighted,
            scale if offset is None else offset,
            self.rows.ids if self.live.index is None else self.live.index,
            *self.rows,
            self.values,
            slope,
            scale,
            chunk.start,
            self.values.shape[1],
            slots,
            self.shard.vocabulary,
            ALL=self.live.index is None,
            TAIL=rest is not None,
            POWERS=offset is not None,
            DIVERGENCE=CODES[self.objective.divergence],
            BETA=self.objective.beta,
            LEAST=LEAST[listed.dtype],
            BLOCK=block,
            num_warps=max(1, min(4, block // 64)),
        )
        return slope, scale


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
    rows = Rows(*(value.contiguous() for value in rows))
    (live,) = split_rows(rows.live)
    results = Results(rows, live, shard, objective, accumulation_dtype(hidden.dtype))
    walk = _dense if objective.tail else _gathered
    gradients = walk(hidden, weight, results, need_hidden, need_weight)
    loss, *metrics = results.values.unbind()
    return loss.sum(), *(metric.clone() for metric in metrics), *gradients


def _dense(
    hidden: Tensor, weight: Tensor, results: Results, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad hidden, grad weight), by products with the whole shard."""
    shard, live = results.shard, results.live
    gradients = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    buffers = ChunkBuffers(live.count, hidden, weight)
    nobody = torch.full((min(live.count, buffers.rows),), -1, device=hidden.device)
    # float16 has not the range to hold exp(z - c) before the slopes are known: there dz takes a second pass.
    one_pass = hidden.dtype != torch.float16
    for chunk in buffers.chunks(live.count):
        index = live[chunk]
        chunk_hidden, ids = hidden[index], results.rows.ids[index]
        target = nobody[: ids.shape[0]]
        z = buffers.logits(chunk_hidden, weight, results.objective.temperature)
        listed = shard.sum(_take(z, ids, shard))
        narrow = narrow_view(z, hidden.dtype)
        powers = narrow if one_pass and (need_hidden or need_weight) else None
        local, offset = reduce_rows(z, target, shard.start, shard.vocabulary, powers)
        whole = merge_shards(local, shard.ranks)
        slope, scale = results.score(chunk, listed, whole[:3], None if powers is None else offset)
        if powers is not None:
            _put(powers, slope, ids, shard)
            gradients.add(index, powers, chunk_hidden, scale)
        elif need_hidden or need_weight:
            differentiate_rows(z, narrow, target, shard.start, shard.vocabulary, whole.logsumexp, -scale)
            _put(narrow, slope, ids, shard)
            gradients.add(index, narrow, chunk_hidden)
    return gradients.exact_result(shard.ranks)


def _gathered(
    hidden: Tensor, weight: Tensor, results: Results, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad hidden, grad weight), by products with the listed rows of the weight alone."""
    shard, live = results.shard, results.live
    hidden, weight = hidden.contiguous(), weight.contiguous()
    dtype = accumulation_dtype(hidden.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    if live.count == 0:
        return grad_hidden, grad_weight.zero_()
    width, slots = hidden.shape[1], results.rows.ids.shape[1]
    index = torch.arange(live.count, device=hidden.device) if live.index is None else live.index
    ids = results.rows.ids[index]
    listed = torch.empty(live.count, slots, dtype=dtype, device=hidden.device)
    sizes = {"BLOCK_H": min(256, triton.next_power_of_2(width)), "ACC": accumulator(dtype), "num_warps": 4}
    at_rows = (index, ids, shard.start, shard.size, slots, width)
    _dot_listed[live.count, triton.cdiv(slots, 16)](hidden, weight, listed, *at_rows, BLOCK_K=16, **sizes)
    listed = shard.sum(listed.div_(results.objective.temperature))
    slope, _ = results.score(slice(0, live.count), listed, None, None)
    if need_hidden:
        grad = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if shard.ranks else grad_hidden
        grid = live.count, triton.cdiv(width, sizes["BLOCK_H"])
        _grad_hidden_listed[grid](slope, weight, grad, *at_rows, BLOCK_K=16, **sizes)
        grad_hidden = shard.sum(grad).to(hidden.dtype)
    if need_weight:
        column, inside = shard.columns(ids)
        key, order = column.masked_fill(~inside, shard.size).flatten().to(torch.int32).sort(stable=True)
        begin = torch.searchsorted(key, torch.arange(shard.size + 1, dtype=torch.int32, device=key.device))
        grid = shard.size, triton.cdiv(width, sizes["BLOCK_H"])
        _grad_weight_listed[grid](slope, hidden, grad_weight, index, order, begin, slots, width, BLOCK_K=16, **sizes)
    return grad_hidden, grad_weight


def _take(z: Tensor, ids: Tensor, shard: Shard) -> Tensor:
    """The logits of the ids [rows, K], 0 where another shard holds them; OUT stands in their places afterwards."""
    listed = z.new_empty(ids.shape)
    slots = ids.shape[1]
    if ids.numel():
        _move[ids.shape[0],](
            z, listed, ids, slots, shard.start, shard.size, z.stride(0),
            TAKE=True, BLOCK=triton.next_power_of_2(slots), num_warps=1,
        )  # fmt: skip
    return listed


def _put(matrix: Tensor, slope: Tensor, ids: Tensor, shard: Shard) -> None:
    """matrix [rows, V] gets slope [rows, K] at the ids that this shard holds."""
    slots = ids.shape[1]
    if ids.numel():
        _move[ids.shape[0],](
            matrix, slope, ids, slots, shard.start, shard.size, matrix.stride(0),
            TAKE=False, BLOCK=triton.next_power_of_2(slots), num_warps=1,
        )  # fmt: skip


class Backend:
    """The triton backend."""

    forward = staticmethod(forward)

    @staticmethod
    def refuses(hidden: Tensor, teacher_ids: Tensor) -> str | None:
        slots = teacher_ids.shape[1]
        return None if slots <= MAX_SLOTS else f"takes K <= {MAX_SLOTS} ids per row, there are {slots}"


@triton.jit
def _move(matrix, listed, ids, slots, start, columns, stride, TAKE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    mask = slot < slots
    id = tl.load(ids + row * slots + slot, mask=mask, other=-1)
    inside = mask & (id >= start) & (id < start + columns)
    place = matrix + row * stride + tl.where(inside, id - start, 0)
    if TAKE:
        tl.store(listed + row * slots + slot, tl.load(place, mask=inside, other=0.0), mask=mask)
        # Were an id twice in the row, both slots should read before one writes.
        tl.debug_barrier()
        tl.store(place, tl.full([BLOCK], OUT, listed.dtype.element_ty), mask=inside)
    else:
        value = tl.load(listed + row * slots + slot, mask=inside, other=0.0)
        tl.store(place, value.to(matrix.dtype.element_ty), mask=inside)


# Rows of one tensor, aligned or not by the number of rows: no reason to compile anew.
@triton.jit(
    do_not_specialize=["first", "tokens"], do_not_specialize_on_alignment=["maximum", "total", "weighted", "offset"]
)
def _score(
    listed,
    maximum,
    total,
    weighted,
    offset,
    index,
    ids,
    logprobs,
    row_weight,
    values,
    slope,
    scale,
    first,
    tokens,
    slots,
    vocabulary,
    ALL: tl.constexpr,
    TAIL: tl.constexpr,
    POWERS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    if not ALL:
        token = tl.load(index + token)
    slot = tl.arange(0, BLOCK)
    mask = slot < slots
    id = tl.load(ids + token * slots + slot, mask=mask, other=-1)
    used = id >= 0
    others = tl.sum(used.to(tl.int32), 0) < vocabulary
    wrong = tl.max((id >= vocabulary).to(tl.int32), 0)
    for other in range(slots):
        twice = used & (id == tl.load(ids + token * slots + other)) & (slot != other)
        wrong = tl.maximum(wrong, tl.max(twice.to(tl.int32), 0))

    # The buckets, in float64: it is little, and so rounding enters by the logits alone.
    log_t = tl.load(logprobs + token * slots + slot, mask=used, other=0.0).to(tl.float64)
    mass = tl.sum(tl.where(used, tl.exp(log_t), 0.0), 0)
    log_t, log_t0, t, t0 = _teacher(log_t, mass, used, others, TAIL)
    logit = tl.load(listed + row * slots + slot, mask=used, other=0.0).to(tl.float64)
    rest = mass * 0.0
    rest_entropy = mass * 0.0
    if TAIL:
        rest_total = tl.where(others, tl.load(total + row).to(tl.float64), 1.0)
        rest = tl.load(maximum + row).to(tl.float64) + tl.log(rest_total)
        rest_entropy = tl.log(rest_total) - tl.load(weighted + row).to(tl.float64) / rest_total
    log_q, log_q0, q, q0 = _student(logit, rest, used, others, TAIL)
    divergence, g, g0 = _divergence(log_q, log_q0, q, q0, log_t, log_t0, t, t0, used, DIVERGENCE, BETA)
    entropy = -tl.sum(_times(q, log_q), 0) - _times(q0, log_q0) + _times(q0, rest_entropy)

    # What the host would refuse, and a device must not wait to look at, ends as NaN in the row.
    divergence = tl.where(wrong > 0, float("nan"), divergence)
    g = tl.where(wrong > 0, float("nan"), g)
    g0 = tl.where(wrong > 0, float("nan"), g0)
    tl.store(values + token, tl.load(row_weight + token).to(tl.float64) * divergence)
    tl.store(values + tokens + token, divergence)
    tl.store(values + 2 * tokens + token, mass)
    tl.store(values + 3 * tokens + token, tl.sum(q, 0))
    tl.store(values + 4 * tokens + token, entropy)

    factor = tl.load(scale + row).to(tl.float64)
    if POWERS:
        small = tl.max(tl.abs(g), 0) * LEAST
        i = tl.where(others, g0 * tl.exp(tl.load(offset + row).to(tl.float64) - rest), 0.0)
        i = tl.where(tl.abs(i) < small, small, i)
        g = g / tl.where(i == 0.0, 1.0, i)
        tl.store(scale + row, factor * i)
    else:
        g = g * factor
        tl.store(scale + row, factor * g0)
    tl.store(slope + row * slots + slot, g, mask=mask)


@triton.jit
def _teacher(logprob, mass, used, others, TAIL: tl.constexpr):
    """(log t, log t_0, t, t_0): the teacher's buckets; 0 where there is none."""
    left = mass * 0.0
    if TAIL:
        left = tl.where(others, tl.maximum(1.0 - mass, FLOOR), 0.0)
        norm = tl.log(mass + left)
    else:
        peak = tl.max(tl.where(used, logprob, float("-inf")), 0)
        norm = peak + tl.log(tl.sum(tl.where(used, tl.exp(logprob - peak), 0.0), 0))
    log_t = tl.where(used, logprob - norm, 0.0)
    log_t0 = tl.where(left > 0.0, tl.log(tl.where(left > 0.0, left, 1.0)) - norm, 0.0)
    return log_t, log_t0, tl.where(used, tl.exp(log_t), 0.0), tl.where(left > 0.0, tl.exp(log_t0), 0.0)


@triton.jit
def _student(logit, rest, used, others, TAIL: tl.constexpr):
    """(log q, log q_0, q, q_0): the softmax of the bucket logits; 0 where there is none."""
    others = others & TAIL
    peak = tl.max(tl.where(used, logit, float("-inf")), 0)
    peak = tl.where(others, tl.maximum(peak, rest), peak)
    norm = tl.sum(tl.where(used, tl.exp(logit - peak), 0.0), 0)
    norm = tl.log(norm + tl.where(others, tl.exp(rest - peak), 0.0))
    log_q = tl.where(used, (logit - peak) - norm, 0.0)
    log_q0 = tl.where(others, (rest - peak) - norm, 0.0)
    return log_q, log_q0, tl.where(used, tl.exp(log_q), 0.0), tl.where(others, tl.exp(log_q0), 0.0)


@triton.jit
def _divergence(log_q, log_q0, q, q0, log_t, log_t0, t, t0, used, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """(divergence, g, g_0): see the definition's ``divergence_and_slope``."""
    if DIVERGENCE == FORWARD:
        divergence = tl.sum(_times(t, log_t - log_q), 0) + _times(t0, log_t0 - log_q0)
        return divergence, q - t, q0 - t0
    log_m = log_t
    log_m0 = log_t0
    if DIVERGENCE == JSD:
        log_m = tl.log(tl.where(used, BETA * t + (1.0 - BETA) * q, 1.0))
        log_m0 = tl.log(tl.where(t0 + q0 == 0.0, 1.0, BETA * t0 + (1.0 - BETA) * q0))
    divergence = tl.sum(_times(q, log_q - log_m), 0) + _times(q0, log_q0 - log_m0)
    g = _times(q, log_q - log_m - divergence)
    g0 = _times(q0, log_q0 - log_m0 - divergence)
    if DIVERGENCE == JSD:
        g = (1.0 - BETA) * g
        g0 = (1.0 - BETA) * g0
        from_teacher = tl.sum(_times(t, log_t - log_m), 0) + _times(t0, log_t0 - log_m0)
        divergence = BETA * from_teacher + (1.0 - BETA) * divergence
    return divergence, g, g0


@triton.jit
def _times(p, x):
    """p x, and 0 where p is 0, whatever x is."""
    return p * tl.where(p == 0.0, 0.0, x)


@triton.jit
def _dot_listed(
    hidden,
    weight,
    listed,
    index,
    ids,
    start,
    columns,
    slots,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index + row)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    id = tl.load(ids + row * slots + slot, mask=slot < slots, other=-1)
    inside = (id >= start) & (id < start + columns)
    place = weight + tl.where(inside, id - start, 0) * width
    total = tl.zeros([BLOCK_K, BLOCK_H], ACC)
    for begin in range(0, width, BLOCK_H):
        column = begin + tl.arange(0, BLOCK_H)
        there = column < width
        h = tl.load(hidden + token * width + column, mask=there, other=0.0).to(ACC)
        w = tl.load(place[:, None] + column[None, :], mask=inside[:, None] & there[None, :], other=0.0).to(ACC)
        total += w * h[None, :]
    logit = tl.where(inside, tl.sum(total, 1), 0.0)
    tl.store(listed + row * slots + slot, logit, mask=slot < slots)


@triton.jit
def _grad_hidden_listed(
    slope,
    weight,
    grad_hidden,
    index,
    ids,
    start,
    columns,
    slots,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index + row)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = column < width
    total = tl.zeros([BLOCK_K, BLOCK_H], ACC)
    for begin in range(0, slots, BLOCK_K):
        slot = begin + tl.arange(0, BLOCK_K)
        id = tl.load(ids + row * slots + slot, mask=slot < slots, other=-1)
        inside = (id >= start) & (id < start + columns)
        g = tl.load(slope + row * slots + slot, mask=inside, other=0.0)
        place = weight + tl.where(inside, id - start, 0) * width
        w = tl.load(place[:, None] + column[None, :], mask=inside[:, None] & there[None, :], other=0.0).to(ACC)
        total += g[:, None] * w
    grad = tl.sum(total, 0).to(grad_hidden.dtype.element_ty)
    tl.store(grad_hidden + token * width + column, grad, mask=there)


@triton.jit
def _grad_weight_listed(
    slope,
    hidden,
    grad_weight,
    index,
    order,
    begin,
    slots,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):
    id = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = column < width
    total = tl.zeros([BLOCK_K, BLOCK_H], ACC)
    end = tl.load(begin + id + 1)
    for first in range(tl.load(begin + id), end, BLOCK_K):
        entry = first + tl.arange(0, BLOCK_K)
        here = entry < end
        place = tl.load(order + entry, mask=here, other=0)
        g = tl.load(slope + place, mask=here, other=0.0)
        token = tl.load(index + place // slots, mask=here, other=0)
        row = hidden + token * width
        h = tl.load(row[:, None] + column[None, :], mask=here[:, None] & there[None, :], other=0.0).to(ACC)
        total += g[:, None] * h
    tl.store(grad_weight + id * width + column, tl.sum(total, 0), mask=there)

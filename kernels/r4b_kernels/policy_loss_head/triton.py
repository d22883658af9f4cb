"""Triton backend of policy_loss_head: the logits of a chunk are read once and become, in place, what dz is made of.

With c the row's offset and L = exp(logsumexp - c), the gradient of a row's logits is

    dz = -slope / L * (exp(z - c) - L onehot)

slope being the loss's derivative by the row's log-probability. exp(z - c) is written in the pass that sums it, before L
is known; then one element a row is mended, and -slope / L, a factor per row, goes to the small operand of each backward
product. This takes one read and one half-precision write of the logits; a pass of its own for dz would read them twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, RowSubset, narrow_view
from r4b_kernels.linear_logprob.triton import differentiate_rows, reduce_rows
from r4b_kernels.policy_loss_head.cpu import live_and_idle
from r4b_kernels.policy_loss_head.reference import LOG_DIFFERENCE_LIMIT, Objective, Rows
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import RowStatistics, group_of, merge_shards, shard_start, vocabulary_size

ROWS = 128
# A shard whose logits lie this far below the other shards' has no probability to speak of: at most V exp(16 - 44), 1e-7
# in all. Without a limit L, and with it the element that holds the target, would leave the range of float32.
FARTHEST = {torch.float32: 44.0, torch.float64: 600.0}


class Metrics:
    """Results per row [T], filled in by ``score``; rows never scored keep what a row without a loss has."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        self.rows = rows
        # loss, logprob, entropy, ratio, kl
        self.values = torch.zeros(5, *rows.target.shape, dtype=dtype, device=rows.target.device)
        self.values[3] = 1.0
        self.clipped = torch.zeros(rows.target.shape, dtype=torch.bool, device=rows.target.device)

    def score(
        self,
        part: RowSubset,
        chunk: slice,
        whole: RowStatistics,
        objective: Objective,
        powers: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        """Fill in the rows ``part[chunk]`` from their statistics; returns the factor of their logits' gradient [rows].

        ``powers`` are exp(z - offset) [rows, V] and offset [rows]: the target's element is mended, and the factor is
        that of powers. Without them it is the derivative of the loss by minus the target's logit.
        """
        count = chunk.stop - chunk.start
        scale = torch.empty_like(whole.total)
        matrix, offset = (whole.total, whole.maximum) if powers is None else powers
        ref_logprob = self.rows.ref_logprob
        _score[triton.cdiv(count, ROWS),](
            *whole,
            offset,
            self.rows.target if part.index is None else part.index,
            *self.rows[:4],
            self.rows.old_logprob if ref_logprob is None else ref_logprob,
            self.values,
            self.clipped,
            scale,
            matrix,
            chunk.start,
            count,
            self.clipped.numel(),
            start,
            start + (0 if powers is None else matrix.shape[1]),
            matrix.stride(0),
            1.0 - objective.clip_low,
            1.0 + objective.clip_high,
            objective.kl_coef,
            1.0 / objective.temperature,
            ALL=part.index is None,
            REFERENCE=ref_logprob is not None,
            POWERS=powers is not None,
            LIMIT=LOG_DIFFERENCE_LIMIT,
            FARTHEST=FARTHEST[whole.total.dtype],
            ROWS=ROWS,
            num_warps=4,
        )
        return scale

    def results(self) -> tuple[Tensor, ...]:
        """(loss, logprob, entropy, ratio, kl, clipped)."""
        loss, logprob, entropy, ratio, kl = self.values.unbind()
        return loss.sum(), logprob.clone(), entropy.clone(), ratio.clone(), kl.clone(), self.clipped


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
    start, vocabulary = shard_start(weight.shape[0], ranks), vocabulary_size(weight.shape[0], ranks)
    rows = rows.contiguous()
    metrics = Metrics(rows, accumulation_dtype(hidden.dtype))
    gradients = GradientAccumulator(hidden, weight, need_hidden, need_weight)
    live, idle = live_and_idle(rows, objective, need_hidden or need_weight)
    buffers = ChunkBuffers(max(live.count, idle.count), hidden, weight)
    # float16 has not the range to hold exp(z - c) before L is known: there dz takes a second pass.
    one_pass = hidden.dtype != torch.float16
    for part, with_gradient in ((live, need_hidden or need_weight), (idle, False)):
        for chunk in buffers.chunks(part.count):
            index = part[chunk]
            chunk_hidden, target = hidden[index], rows.target[index].contiguous()
            z = buffers.logits(chunk_hidden, weight, objective.temperature)
            narrow = narrow_view(z, hidden.dtype)
            powers = narrow if with_gradient and one_pass else None
            local, offset = reduce_rows(z, target, start, vocabulary, powers)
            whole = merge_shards(local, ranks)
            mended = None if powers is None else (powers, offset)
            scale = metrics.score(part, chunk, whole, objective, mended, start)
            if powers is not None:
                gradients.add(index, powers, chunk_hidden, scale)
            elif with_gradient:
                differentiate_rows(z, narrow, target, start, vocabulary, whole.logsumexp, -scale)
                gradients.add(index, narrow, chunk_hidden)
    return *metrics.results(), *gradients.exact_result(ranks)


# The statistics are rows of one tensor, aligned or not as the count of rows has it: not worth compiling twice.
@triton.jit(
    do_not_specialize=["begin", "count", "tokens"],
    do_not_specialize_on_alignment=["maximum", "total", "weighted", "wanted", "offset"],
)
def _score(
    maximum,
    total,
    weighted,
    wanted,
    offset,
    index,
    target,
    old_logprob,
    advantage,
    row_weight,
    ref_logprob,
    values,
    clipped,
    scale,
    powers,
    begin,
    count,
    tokens,
    first,
    last,
    stride,
    low,
    high,
    kl_coef,
    inverse_temperature,
    ALL: tl.constexpr,
    REFERENCE: tl.constexpr,
    POWERS: tl.constexpr,
    LIMIT: tl.constexpr,
    FARTHEST: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < count
    token = (begin + row).to(tl.int64)
    if not ALL:
        token = tl.load(index + token, mask=mask, other=0)
    peak = tl.load(maximum + row, mask=mask, other=0.0)
    mass = tl.load(total + row, mask=mask, other=1.0)
    logit = tl.load(wanted + row, mask=mask, other=0.0)
    logprob = (logit - peak) - tl.log(mass)
    entropy = tl.log(mass) - tl.load(weighted + row, mask=mask, other=0.0) / mass

    label = tl.load(target + token, mask=mask, other=-1)
    weight = tl.load(row_weight + token, mask=mask, other=0.0)
    use = (label >= 0) & (weight != 0.0)
    gain = tl.where(use, tl.load(advantage + token, mask=mask, other=0.0), 0.0)
    gap = tl.where(use, logprob - tl.load(old_logprob + token, mask=mask, other=0.0), 0.0)
    ratio = tl.exp(_clamp(gap, -LIMIT, LIMIT))
    free = ratio * gain
    bound = _clamp(ratio, low, high) * gain
    cut = bound < free
    loss = -tl.where(cut, bound, free)
    slope = tl.where((tl.abs(gap) > LIMIT) | cut, 0.0, -free)
    kl = tl.zeros_like(logprob)
    if REFERENCE:
        gap = tl.where(use, tl.load(ref_logprob + token, mask=mask, other=0.0) - logprob, 0.0)
        near = _clamp(gap, -LIMIT, LIMIT)
        kl = _exp_beyond_linear(near)
        loss += kl_coef * kl
        slope -= tl.where(tl.abs(gap) > LIMIT, 0.0, kl_coef * (kl + near))
    loss = tl.where(use, weight * loss, 0.0)
    slope = tl.where(use, weight * slope, 0.0) * inverse_temperature

    tl.store(values + token, loss, mask=mask)
    tl.store(values + tokens + token, logprob, mask=mask)
    tl.store(values + 2 * tokens + token, entropy, mask=mask)
    tl.store(values + 3 * tokens + token, ratio, mask=mask)
    tl.store(values + 4 * tokens + token, kl, mask=mask)
    tl.store(clipped + token, cut, mask=mask)
    if POWERS:
        base = tl.load(offset + row, mask=mask, other=0.0)
        level = tl.exp(tl.minimum(peak - base, FARTHEST)) * mass
        inside = mask & (label >= first) & (label < last)
        element = powers + row.to(tl.int64) * stride + tl.where(inside, label - first, 0)
        tl.store(element, (tl.exp(logit - base) - level).to(powers.dtype.element_ty), mask=inside)
        slope = slope / level
    tl.store(scale + row, -slope, mask=mask)


@triton.jit
def _clamp(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _exp_beyond_linear(x):
    """exp(x) - 1 - x, accurate near 0 too: there by its series, in float64's precision."""
    small = tl.abs(x) < 0.5
    near = tl.where(small, x, 0.0)
    series = tl.zeros_like(x)
    for k in tl.static_range(15):
        series = (series * near + 1.0) / (16 - k)
    return tl.where(small, series * near * near, tl.exp(x) - 1.0 - x)

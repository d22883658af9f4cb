"""Triton backend of draw_tokens: one pass over the logits in blocks, then a program per row on what they sum to.

``_sum_blocks`` leaves of every block its largest logit, where that is, and two sums over the exponentials below it.
``_draw`` adds a row's blocks in their order, finds the one in which the point lies, and reads that one again. A nucleus
is all tokens above a weight, and of those that have it the first few: that weight is found by bisection over its bits,
with a pass over the row, which stays in the cache, for each of them.

Weights are computed in float32, as the definition does, and added in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator

BLOCK = 4096
WARPS = 8
# A nucleus is sought by one program per row, alone on its multiprocessor.
NUCLEUS_WARPS = 16


class Backend:
    """The triton backend."""

    @staticmethod
    def forward(
        logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors contiguous. A point or a forced token out of its range makes the row's log-prob NaN."""
        rows, count = logits.shape
        logprob = logits.new_empty(rows, dtype=accumulation_dtype(logits.dtype))
        entropy, token = torch.empty_like(logprob), torch.empty_like(logprob, dtype=torch.int64)
        if not rows:
            return token, logprob, entropy
        block = min(BLOCK, max(16, triton.next_power_of_2(count)))
        blocks = triton.cdiv(count, block)
        largest = logprob.new_empty(rows, blocks)
        place = torch.empty_like(largest, dtype=torch.int32)
        total, product = logprob.new_empty(2, rows, blocks, dtype=torch.float64).unbind()
        constants = {
            "COUNT": count,
            "BLOCK": block,
            "TEMPERATURE": temperature or 1.0,
            "ACC": accumulator(logits.dtype),
        }
        _sum_blocks[rows * blocks,](logits, largest, place, total, product, **constants, num_warps=WARPS)
        nucleus = top_p < 1 and temperature > 0
        _draw[rows,](
            logits, point, forced, largest, place, total, product, token, logprob, entropy,
            GREEDY=temperature == 0, TOP_P=top_p if nucleus else 1.0, BLOCKS=triton.next_power_of_2(blocks),
            **constants, num_warps=NUCLEUS_WARPS if nucleus else WARPS,
        )  # fmt: skip
        return token, logprob, entropy


@triton.jit
def _load(logits, start, COUNT: tl.constexpr, BLOCK: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr):
    """Logits [start, start + BLOCK) of a row over the temperature; -inf past its end."""
    index = start + tl.arange(0, BLOCK)
    x = tl.load(logits + index, mask=index < COUNT, other=float("-inf")).to(ACC)
    if TEMPERATURE != 1.0:
        # The definition's division: the fast one is off by an ulp, of logits that may be large.
        x = tl.div_rn(x, TEMPERATURE) if ACC == tl.float32 else x / TEMPERATURE
    return x


@triton.jit
def _weights(x, largest):
    """exp(x - largest) and the exponent; 0 where both are -inf."""
    exponent = x - tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp(exponent), exponent


@triton.jit
def _sum_blocks(
    logits, largest, place, total, product,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one block: the largest logit, its first place, the sums of w = exp(x - largest) and of w (x - largest)."""
    blocks: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    at = tl.program_id(0).to(tl.int64)
    row, block = at // blocks, tl.program_id(0) % blocks
    x = _load(logits + row * COUNT, block * BLOCK, COUNT, BLOCK, TEMPERATURE, ACC)
    top = tl.max(x, 0)
    weight, exponent = _weights(x, top)
    index = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(largest + at, top)
    tl.store(place + at, tl.min(tl.where((x == top) & (index < COUNT), index, COUNT), 0))
    tl.store(total + at, tl.sum(weight.to(tl.float64), 0))
    # Not 0 times the logarithm of 0.
    tl.store(product + at, tl.sum((weight * tl.where(weight == 0.0, 0.0, exponent)).to(tl.float64), 0))


@triton.jit
def _draw(
    logits, point, forced, largest, place, total, product, token, logprob, entropy,
    GREEDY: tl.constexpr, TOP_P: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The token of one row, its log-prob and the entropy."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * COUNT
    used: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    block = tl.arange(0, BLOCKS)
    inside, at = block < used, row * used + block
    tops = tl.load(largest + at, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    factor, shift = _weights(tops, top)
    # In the precision of the weights: what is nothing beside the largest there is nothing here.
    scaled = tl.load(total + at, mask=inside, other=0.0) * factor.to(tl.float64)
    sums = tl.sum(scaled, 0)
    products = tl.load(product + at, mask=inside, other=0.0) * factor.to(tl.float64)
    products = tl.sum(products + scaled * tl.where(factor == 0.0, 0.0, shift).to(tl.float64), 0)
    log_sum = tl.log(sums)
    tl.store(entropy + row, (log_sum - products / sums).to(ACC))

    target = tl.load(point + row)
    sound = (target >= 0.0) & (target < 1.0)
    given = tl.full([], -1, tl.int64)
    if forced is not None:
        given = tl.load(forced + row)
        sound = tl.where(given == -1, sound, (given >= 0) & (given < COUNT))
    drawn = tl.full([], COUNT, tl.int32)
    if GREEDY:
        places = tl.load(place + at, mask=inside, other=COUNT)
        drawn = tl.min(tl.where((tops == top) & inside, places, COUNT), 0)
    else:
        if given < 0:
            if TOP_P < 1:
                drawn = _invert_nucleus(logits, top, target, TOP_P, COUNT, BLOCK, TEMPERATURE, ACC)
            else:
                drawn = _invert(logits, scaled, factor, tops, target * sums, inside, COUNT, BLOCK, TEMPERATURE, ACC)
    # Of logits that are not numbers, too, a token that exists.
    chosen = tl.where(given < 0, drawn.to(tl.int64), given)
    chosen = tl.minimum(tl.maximum(chosen, 0), COUNT - 1)
    x = tl.max(_load(logits, chosen, COUNT, 1, TEMPERATURE, ACC), 0)
    result = (x - top).to(tl.float64) - log_sum
    tl.store(logprob + row, tl.where(sound, result, float("nan")).to(ACC))
    tl.store(token + row, chosen)


@triton.jit
def _invert(
    logits, scaled, factor, tops, target, inside, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first token whose cumulative weight is above ``target``, by way of the first block whose is."""
    block = tl.arange(0, scaled.shape[0])
    reached = tl.cumsum(scaled, 0)
    last = tl.max(tl.where(scaled > 0.0, block, 0), 0)
    found = tl.min(tl.where((reached > target) & (scaled > 0.0), block, last), 0)
    here = block == found
    before = tl.sum(tl.where(block < found, scaled, 0.0), 0)
    share = tl.sum(tl.where(here, factor, 0.0), 0).to(tl.float64)
    weight, _ = _weights(
        _load(logits, found * BLOCK, COUNT, BLOCK, TEMPERATURE, ACC), tl.max(tl.where(here, tops, float("-inf")), 0)
    )
    index = found * BLOCK + tl.arange(0, BLOCK)
    # Rounding may put a target behind a block's end: then it is the last token there that has a weight.
    final = tl.max(tl.where(weight > 0.0, index, 0), 0)
    above = (tl.cumsum(weight.to(tl.float64), 0) * share + before > target) & (weight > 0.0)
    return tl.min(tl.where(above, index, final), 0)


@triton.jit
def _bits(x):
    """A weight's bits: integers in the order of the weights."""
    return x.to(tl.int64, bitcast=True) if x.dtype == tl.float64 else x.to(tl.int32, bitcast=True)


@triton.jit
def _sum_from(
    logits, top, threshold, COUNT: tl.constexpr, BLOCK: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr
):
    """The sum of the weights whose bits are at least ``threshold``."""
    # Two blocks at once, for more bytes on their way.
    sums = tl.zeros([2 * BLOCK], tl.float64)
    for start in range(0, COUNT, 2 * BLOCK):
        weight, _ = _weights(_load(logits, start, COUNT, 2 * BLOCK, TEMPERATURE, ACC), top)
        sums += tl.where(_bits(weight) >= threshold, weight, 0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _invert_nucleus(
    logits, top, point, TOP_P: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TEMPERATURE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The first token of the nucleus whose cumulative weight is above ``point`` times the nucleus'."""
    one = tl.full([], 1.0, ACC)
    low, high = _bits(one) * 0, _bits(one) + 1
    wanted = _sum_from(logits, top, low, COUNT, BLOCK, TEMPERATURE, ACC) * TOP_P
    # Weights from `low` on reach what is wanted, those from `high` on do not.
    above = wanted * 0.0
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = _sum_from(logits, top, middle, COUNT, BLOCK, TEMPERATURE, ACC)
        enough = reached >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        above = tl.where(enough, above, reached)
    edge = low.to(ACC, bitcast=True).to(tl.float64)
    # Of the tokens at the edge as many as begin below what is wanted.
    taken = tl.ceil((wanted - above) / edge)
    index = tl.arange(0, BLOCK)
    ties, reached, drawn, final = wanted * 0.0, wanted * 0.0, low.to(tl.int32) * 0 + COUNT, low.to(tl.int32) * 0
    target = point * (above + taken * edge)
    start = 0
    while (start < COUNT) & (drawn == COUNT):
        weight, _ = _weights(_load(logits, start, COUNT, BLOCK, TEMPERATURE, ACC), top)
        tied = (_bits(weight) == low) & (weight > 0.0)
        rank = ties + tl.cumsum(tied.to(tl.float64), 0)
        kept = (_bits(weight) > low) | (tied & (rank <= taken))
        share = tl.where(kept, weight, 0.0).to(tl.float64)
        found = kept & (reached + tl.cumsum(share, 0) > target)
        drawn = tl.min(tl.where(found, start + index, COUNT), 0)
        final = tl.maximum(final, tl.max(tl.where(kept, start + index, 0), 0))
        reached += tl.sum(share, 0)
        ties += tl.sum(tied.to(tl.float64), 0)
        start += BLOCK
    return tl.where(drawn == COUNT, final, drawn)

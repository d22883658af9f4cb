"""Triton backend of decode_attention: keys and values in stretches, one program each, then the stretches together.

Three kernels. ``_append`` norms and turns the heads of a row and writes its key and value to the cache. ``_attend``
meets tiles of queries of one key/value head with one stretch of keys: all queries of a prompt's rows with the prompt's,
those of one row with its own. ``_merge`` brings a row's stretches together in their order. Stretches have a fixed
length, so that a row's sums are the same whatever rows are beside it.

A prompt's first tile of queries is number (queries before it) // tile + (prompts before it), which leaves room for all
of its tiles: a program finds its prompt by bisection, and the host needs to know no more than N and G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 256
HEADS_AT_ONCE = 8  # of a row, in _append and _merge


@dataclass(frozen=True)
class Tile:
    """How ``_attend`` is cut.

    Attributes:
        shared: queries at once that meet a prompt's keys.
        own: queries at once that meet a row's own, at least 16.
        steps: keys at once.
        stretch: keys of a program, a multiple of ``steps``.
        warps: of a program.
        stages: of the pipeline over the keys.
    """

    shared: int
    own: int
    steps: int
    stretch: int
    warps: int
    stages: int


# By head dim up to: chosen for no spill on sm_90a, and shared memory that every GPU from compute capability 8.0 on has.
_HALF = {128: Tile(64, 16, 64, 512, 4, 2), 256: Tile(64, 16, 32, 512, 8, 2)}
_SINGLE = {64: Tile(16, 16, 32, 512, 4, 1), 128: Tile(16, 16, 32, 512, 8, 1), 256: Tile(16, 16, 16, 512, 8, 1)}
# Tests set this to a small tile, so that small caches take every path.
override: Tile | None = None


def tile_for(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a head dim of at most 256."""
    if override is not None:
        return override
    table = _SINGLE if dtype.itemsize >= 4 else _HALF
    return next(tile for limit, tile in table.items() if head_dim <= limit)


class Backend:
    """The triton backend."""

    @staticmethod
    def refuses(prompt_values: Tensor, own_values: Tensor) -> str | None:
        if own_values.shape[3] > MAX_HEAD_DIM:
            return f"head_dim D={own_values.shape[3]}, at most {MAX_HEAD_DIM} fits"
        if own_values.device.type == "cuda" and own_values.dtype == torch.float64:
            return "float64 is for the interpreter only"
        return None

    @staticmethod
    def forward(
        mixed: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rope: Tensor,
        column: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        prompt_lengths: Tensor,
        offsets: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        eps: float,
        scale: float,
    ) -> Tensor:
        """All tensors contiguous. Offsets, lengths or columns out of their range make rows NaN."""
        rows, heads, each, dim = mixed.shape
        share, prompts, longest, columns = each - 2, *prompt_values.shape[1:3], own_values.shape[2]
        out = mixed.new_empty(rows, heads * share * dim)
        if not rows or not prompts:
            return out.fill_(float("nan"))
        tile = tile_for(dim, mixed.dtype)
        prompt_stretches, own_stretches = triton.cdiv(longest, tile.stretch), triton.cdiv(columns, tile.stretch)
        stretches = prompt_stretches + own_stretches
        query = mixed.new_empty(heads, rows * share, dim)
        exact = accumulation_dtype(mixed.dtype)
        top, total = mixed.new_empty(2, stretches, heads, rows * share, dtype=exact).unbind()
        weighted = mixed.new_empty(stretches, heads, rows * share, dim, dtype=exact)
        sizes = {
            "SHARE": share,
            "D": dim,
            "WIDTH": max(16, triton.next_power_of_2(dim)),
            "ACC": accumulator(mixed.dtype),
        }
        _append[rows, heads, triton.cdiv(share + 1, HEADS_AT_ONCE)](
            mixed, q_weight, k_weight, rope, column, own_keys, own_values, query, top, rows, columns, stretches,
            EPS=eps, TOGETHER=HEADS_AT_ONCE, **sizes, num_warps=4,
        )  # fmt: skip
        shared_tiles, own_tiles = rows * share // tile.shared + prompts, rows * triton.cdiv(share, tile.own)
        # Where rows of the keys are whole vectors, the kernel is told so.
        prompt_unit, own_unit = (8 if size % 8 == 0 else 1 for size in (longest, columns))
        _attend[shared_tiles * prompt_stretches + own_tiles * own_stretches, heads](
            query, prompt_keys, prompt_values, own_keys, own_values, prompt_lengths, offsets, column,
            top, total, weighted, rows, prompts, longest // prompt_unit, columns // own_unit,
            PROMPT_UNIT=prompt_unit, OWN_UNIT=own_unit, SHARED=tile.shared, OWN=tile.own, STEPS=tile.steps,
            STRETCH=tile.stretch, SCALE=scale, **sizes, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        together = min(HEADS_AT_ONCE, triton.next_power_of_2(share))
        _merge[rows, heads, triton.cdiv(share, together)](
            top, total, weighted, prompt_lengths, offsets, column, out, rows, prompts, longest, columns,
            STRETCH=tile.stretch, TOGETHER=together, **sizes, num_warps=4,
        )  # fmt: skip
        return out


@triton.jit(do_not_specialize=["rows", "columns", "stretches"])
def _append(
    mixed, q_weight, k_weight, rope, column, own_keys, own_values, query, top, rows, columns, stretches,
    EPS: tl.constexpr, TOGETHER: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The queries of a row, normed and turned, to ``query``; its key and value to the caches.

    NaN to ``top``: what no program of ``_attend`` takes, as the offsets are broken, shows.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index, d = tl.program_id(2) * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, WIDTH)
    is_query, is_key, inside = index < SHARE, index == SHARE, d < D
    across = (d + D // 2) % D
    heads = mixed + (row * tl.num_programs(1) + head) * ((SHARE + 2) * D)
    mask = (index <= SHARE)[:, None] & inside[None, :]
    x = tl.load(heads + index[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
    opposite = tl.load(heads + index[:, None] * D + across[None, :], mask=mask, other=0.0).to(ACC)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + EPS)
    cos = tl.load(rope + row * D + d, mask=inside, other=0.0).to(ACC) * _weights(q_weight, k_weight, is_key, d, D, ACC)
    sin = tl.load(rope + (rows + row) * D + d, mask=inside, other=0.0).to(ACC)
    sin = sin * _weights(q_weight, k_weight, is_key, across, D, ACC)
    turned = (x * factor[:, None] * cos + opposite * factor[:, None] * sin).to(query.dtype.element_ty)
    first = (head * rows + row) * SHARE
    tl.store(query + (first + index)[:, None] * D + d[None, :], turned, mask=is_query[:, None] & inside[None, :])
    for stretch in range(stretches):
        at = top + stretch * (tl.num_programs(1) * rows * SHARE).to(tl.int64) + first + index
        tl.store(at, tl.full([TOGETHER], float("nan"), ACC), mask=is_query)
    place = tl.minimum(tl.maximum(tl.load(column + row), 0), columns - 1)
    cache = (head * rows + row) * columns * D
    tl.store(
        own_keys + cache + (d * columns.to(tl.int64))[None, :] + place + index[:, None] * 0,
        turned,
        mask=is_key[:, None] & inside[None, :],
    )
    if tl.program_id(2) == 0:
        value = tl.load(heads + (SHARE + 1) * D + d, mask=inside, other=0.0)
        tl.store(own_values + cache + place * D + d, value, mask=inside)


@triton.jit
def _weights(q_weight, k_weight, is_key, d, D: tl.constexpr, ACC: tl.constexpr):
    """[TOGETHER, WIDTH], the norm's weight of each head."""
    query, key = (tl.load(q_weight + d, mask=d < D, other=0.0), tl.load(k_weight + d, mask=d < D, other=0.0))
    return tl.where(is_key[:, None], key.to(ACC)[None, :], query.to(ACC)[None, :])


@triton.jit
def _find(offsets, prompts, target, FACTOR: tl.constexpr, DIVISOR: tl.constexpr, SLOPE: tl.constexpr):
    """The last prompt g with offsets[g] * FACTOR // DIVISOR + SLOPE * g <= target; 0 if there is none."""
    low, high = prompts - prompts, prompts
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(offsets + middle) * FACTOR // DIVISOR + SLOPE * middle <= target
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["rows", "prompts", "prompt_units", "own_units"])
def _attend(
    query, prompt_keys, prompt_values, own_keys, own_values, prompt_lengths, offsets, column, top, total, weighted,
    rows, prompts, prompt_units, own_units,
    PROMPT_UNIT: tl.constexpr, OWN_UNIT: tl.constexpr, SHARED: tl.constexpr, OWN: tl.constexpr, STEPS: tl.constexpr,
    STRETCH: tl.constexpr, SCALE: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One tile of queries with one stretch of a prompt's keys, or of its row's own."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    longest, columns = prompt_units * PROMPT_UNIT, own_units * OWN_UNIT
    prompt_stretches, own_stretches = tl.cdiv(longest, STRETCH), tl.cdiv(columns, STRETCH)
    prompt_programs = (rows * SHARE // SHARED + prompts) * prompt_stretches
    queries = (rows * SHARE).to(tl.int64)
    query += head * queries * D
    if program < prompt_programs:
        tile, stretch = program // prompt_stretches, program % prompt_stretches
        prompt = _find(offsets, prompts, tile, SHARE, SHARED, 1)
        start = tl.minimum(tl.maximum(tl.load(offsets + prompt), 0), rows) * SHARE
        first = start + tl.maximum(tile - (start // SHARED + prompt), 0) * SHARED
        stop = tl.minimum(tl.load(offsets + prompt + 1), rows) * SHARE
        length = tl.minimum(tl.load(prompt_lengths + prompt), longest)
        cache = (head * prompts + prompt) * longest * D
        partial = (stretch * tl.num_programs(1) + head) * queries
        _meet(query, prompt_keys + cache, prompt_values + cache, top + partial, total + partial,
              weighted + partial * D, first, stop, stretch * STRETCH, length, prompt_units, PROMPT_UNIT, SHARED, STEPS,
              STRETCH, SCALE, D, WIDTH, ACC)  # fmt: skip
    else:
        rest = program - prompt_programs
        tiles: tl.constexpr = (SHARE + OWN - 1) // OWN
        stretch, tile, row = rest % own_stretches, rest // own_stretches % tiles, rest // own_stretches // tiles
        length = tl.minimum(tl.load(column + row) + 1, columns)
        first, stop = row.to(tl.int64) * SHARE + tile * OWN, (row.to(tl.int64) + 1) * SHARE
        cache = (head * rows + row) * columns * D
        partial = ((prompt_stretches + stretch) * tl.num_programs(1) + head) * queries
        _meet(query, own_keys + cache, own_values + cache, top + partial, total + partial, weighted + partial * D,
              first, stop, stretch * STRETCH, length, own_units, OWN_UNIT, OWN, STEPS, STRETCH, SCALE, D, WIDTH,
              ACC)  # fmt: skip


@triton.jit
def _meet(
    query, keys, values, top, total, weighted, first, stop, begin, length, units, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, STEPS: tl.constexpr, STRETCH: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Queries [first, stop), QUERIES at most, with keys [begin, begin + STRETCH) below ``length``.

    Largest score (base 2), sum of weights and weighted sum of values of each query go to [queries] and [queries, D].
    """
    end = tl.minimum(begin + STRETCH, length).to(tl.int32)
    if (first < stop) & (begin < end):
        index, d = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
        live, inside = index < stop, d < D
        here = index.to(tl.int64)[:, None] * D + d[None, :]
        q = tl.load(query + here, mask=live[:, None] & inside[None, :], other=0.0)
        m = tl.full([QUERIES], float("-inf"), ACC)
        s, sums = tl.zeros([QUERIES], ACC), tl.zeros([QUERIES, WIDTH], ACC)
        # Whole vectors of keys are read; what lies behind the end is taken from the scores.
        readable = tl.cdiv(end, UNIT) * UNIT
        stride = units.to(tl.int64) * UNIT
        for start in range(begin, end, STEPS):
            key = start + tl.arange(0, STEPS)
            mask = (key < readable)[None, :] & inside[:, None]
            k = tl.load(keys + d[:, None] * stride + key[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, k, out_dtype=ACC, input_precision="ieee") * (SCALE * LOG2E)
            scores = tl.where((key < end)[None, :], scores, float("-inf"))
            largest = tl.maximum(m, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - largest[:, None]), tl.exp2(m - largest)
            v = tl.load(
                values + key.to(tl.int64)[:, None] * D + d[None, :],
                mask=(key < end)[:, None] & inside[None, :],
                other=0.0,
            )
            s = s * shrink + tl.sum(weights, 1)
            sums = tl.dot(weights.to(v.dtype), v, acc=sums * shrink[:, None], out_dtype=ACC, input_precision="ieee")
            m = largest
        tl.store(top + index, m, mask=live)
        tl.store(total + index, s, mask=live)
        tl.store(weighted + here, sums, mask=live[:, None] & inside[None, :])


@triton.jit
def _ascending(offsets, prompts, rows):
    """Whether the offsets ascend from 0 to ``rows``."""
    falls = tl.zeros([128], tl.int32)
    for start in range(0, prompts, 128):
        prompt = start + tl.arange(0, 128)
        inside = prompt < prompts
        here = tl.load(offsets + prompt, mask=inside, other=0)
        falls += (tl.load(offsets + prompt + 1, mask=inside, other=0) < here).to(tl.int32)
    return (tl.sum(falls, 0) == 0) & (tl.load(offsets) == 0) & (tl.load(offsets + prompts) == rows)


@triton.jit(do_not_specialize=["rows", "prompts", "longest", "columns"])
def _merge(
    top, total, weighted, prompt_lengths, offsets, column, out, rows, prompts, longest, columns,
    STRETCH: tl.constexpr, TOGETHER: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The stretches of a row, its prompt's first, in one softmax."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index, d = tl.program_id(2) * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, WIDTH)
    live, inside = index < SHARE, d < D
    prompt = _find(offsets, prompts, row, 1, 1, 0)
    length, last = tl.load(prompt_lengths + prompt), tl.load(column + row)
    sound = _ascending(offsets, prompts, rows) & (length >= 0) & (length <= longest) & (last >= -1)
    prompt_stretches = tl.cdiv(longest, STRETCH)
    prompt_used = tl.cdiv(tl.minimum(tl.maximum(length, 0), longest).to(tl.int32), STRETCH)
    own_used = tl.cdiv(tl.minimum(tl.maximum(last + 1, 0), columns).to(tl.int32), STRETCH)
    m = tl.full([TOGETHER], float("-inf"), ACC)
    s, sums = tl.zeros([TOGETHER], ACC), tl.zeros([TOGETHER, WIDTH], ACC)
    for number in range(prompt_used + own_used):
        stretch = number + tl.where(number < prompt_used, 0, prompt_stretches - prompt_used)
        at = ((stretch * tl.num_programs(1) + head) * rows + row) * SHARE + index
        part = tl.load(top + at, mask=live, other=0.0)
        part_sums = tl.load(weighted + at[:, None] * D + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        largest = tl.maximum(m, part)
        shrink, part_shrink = tl.exp2(m - largest), tl.exp2(part - largest)
        s = s * shrink + tl.load(total + at, mask=live, other=0.0) * part_shrink
        sums = sums * shrink[:, None] + part_sums * part_shrink[:, None]
        m = largest
    seen = sound & (s > 0.0)
    result = tl.where(seen[:, None], sums / tl.where(seen, s, 1.0)[:, None], float("nan"))
    at = ((row * tl.num_programs(1) + head) * SHARE + index)[:, None] * D + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])

"""Variable-length attention in Triton: one forward and two backward kernels, under a schedule of tiles.

The score of query i and key j is exp2'd in base 2: with c = scale log2(e), p_ij = exp2(c q_i . k_j - m_i). A tile meets
two ranges of the stream (see _varlen_schedule): the far one (a parent's keys, or all the children's queries) and the
own one (its segments). Blocks that every row sees in full come first, from both ranges in one loop without a mask; then
the few blocks at the diagonal, at borders and at ragged ends, with one.

A head dim D is one or two power-of-two parts: 72 = 64 + 8 of 16, 96 = 64 + 32. Strides are compile-time constants, so
that the compiler sees the 16-byte alignment of heads of 72, and copies asynchronously.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels._varlen_schedule import (
    BROKEN,
    COLUMNS,
    FAR,
    FAR_STOP,
    FLAGS,
    OWN,
    OWN_STOP,
    PADDING,
    SCATTERED,
    SEGMENT,
    START,
    STOP,
    STRADDLES,
    schedule_for,
)
from r4b_kernels.triton_support import accumulator

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MAX_HEAD_DIM = 256
# Bytes of shared memory that the kernels of heads over 128 need; others fit every GPU from compute capability 8.0 on.
WIDE_HEADS_SHARED = 163_840


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: ``rows`` stay with a program, ``steps`` of the other side pass by at a time."""

    rows: int
    steps: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels. ``forward`` and ``queries`` cut query rows, ``keys`` key rows."""

    forward: Tile
    queries: Tile
    keys: Tile


# By head dim up to: chosen for no spill and wgmma on sm_90a (tests/kernels/aot).
_HALF = {
    96: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2)),
}
_SINGLE = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    96: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
_HALF_BIDIRECTIONAL = _HALF | {128: replace(_HALF[128], keys=Tile(128, 32, 8, 2))}
# Tests set this to small tiles, so that small layouts take every path.
override: Tiles | None = None


def tiles_for(head_dim: int, dtype: torch.dtype, causal: bool) -> Tiles:
    """The tiles for a head dim of at most 256."""
    if override is not None:
        return override
    table = _SINGLE if dtype.itemsize >= 4 else _HALF if causal else _HALF_BIDIRECTIONAL
    return next(tiles for limit, tiles in table.items() if head_dim <= limit)


def parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """A head dim as two powers of two of at least 16, the second possibly 0, that cover it with least waste.

    Products of float32 keep all of their inner dim in registers: there a large one is halved.
    """
    if dtype.itemsize >= 4 and head_dim in (128, 256):
        return head_dim // 2, head_dim // 2
    first = max(16, 1 << (head_dim.bit_length() - 1))
    if head_dim <= first:
        return first, 0
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (2 * first, 0) if second == first else (first, second)


def refuses(q: Tensor) -> str | None:
    """Why the kernels cannot serve q, or None."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim D={q.shape[-1]}, at most {MAX_HEAD_DIM} fits"
    if q.device.type == "cuda":
        if q.dtype == torch.float64:
            return "float64 is for the interpreter only"
        if q.shape[-1] * q.dtype.itemsize % 16:
            return f"head_dim D={q.shape[-1]} of {q.dtype} is not a multiple of 16 bytes"
        if q.shape[-1] > 128:
            most = triton.runtime.driver.active.utils.get_device_properties(q.device.index or 0)["max_shared_mem"]
            if most < WIDE_HEADS_SHARED:
                return f"head_dim D={q.shape[-1]} takes {WIDE_HEADS_SHARED} bytes of shared memory, a block has {most}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D] in q.dtype, lse [T, Hq], natural logarithm)."""
    tokens, heads, head_dim = q.shape
    q, k, v = (_token_major(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(tokens, heads, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if tokens == 0:
        return out, lse
    tile = tiles_for(head_dim, q.dtype, causal).forward
    schedule = schedule_for(offsets, parent, tokens, causal)
    queries = schedule.queries(tile.rows)
    _forward[queries.shape[0], heads](
        q,
        k,
        v,
        out,
        lse,
        queries,
        schedule.token_start,
        schedule.token_stop,
        **_constants(q, k, v, scale, causal, tile),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    parent: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v, in their dtype and shape."""
    tokens, heads, head_dim = q.shape
    q, k, v, grad_out = (_token_major(x) for x in (q, k, v, grad_out))
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if tokens == 0:
        return grads
    tiles = tiles_for(head_dim, q.dtype, causal)
    schedule = schedule_for(offsets, parent, tokens, causal)
    # Per head and row, for the second kernel: the log-sum-exp in base 2, and dout . out.
    rows = lse.new_empty(2, heads, tokens)
    queries = schedule.queries(tiles.queries.rows)
    _backward_queries[queries.shape[0], heads](
        grad_out,
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        grads[0],
        rows,
        queries,
        schedule.token_start,
        schedule.token_stop,
        tokens,
        GT=grad_out.stride(0),
        GH=grad_out.stride(1),
        **_constants(q, k, v, scale, causal, tiles.queries),
    )
    keys = schedule.keys(tiles.keys.rows)
    _backward_keys[keys.shape[0], k.shape[1]](
        grad_out,
        q,
        k,
        v,
        grads[1],
        grads[2],
        rows,
        keys,
        schedule.token_parent,
        tokens,
        GT=grad_out.stride(0),
        GH=grad_out.stride(1),
        **_constants(q, k, v, scale, causal, tiles.keys),
    )
    return grads


def _token_major(x: Tensor) -> Tensor:
    """x [T, H, D] with dense heads and strides that do not depend on T."""
    aligned = x.stride(1) * x.itemsize % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    return x if x.stride(2) == 1 and x.stride(0) >= x.stride(1) >= x.shape[2] and aligned else x.contiguous()


def _constants(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, tile: Tile) -> dict[str, object]:
    first, second = parts(q.shape[2], q.dtype)
    return dict(
        QT=q.stride(0),
        QH=q.stride(1),
        KT=k.stride(0),
        KH=k.stride(1),
        VT=v.stride(0),
        VH=v.stride(1),
        HEADS=q.shape[1],
        KV_HEADS=k.shape[1],
        D=q.shape[2],
        D0=first,
        D1=second,
        ROWS=tile.rows,
        STEPS=tile.steps,
        SCALE=scale,
        CAUSAL=causal,
        ACC=accumulator(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _load(
    base, first, live, STRIDE: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) and columns [COLUMN, COLUMN + WIDTH) of [T, D]; 0 past D and, if MASKED, not live."""
    row, column = tl.arange(0, ROWS)[:, None], COLUMN + tl.arange(0, WIDTH)[None, :]
    pointers = base + first.to(tl.int64) * STRIDE + (row * STRIDE + column)
    if MASKED:
        mask = live[:, None]
        if COLUMN + WIDTH > D:
            mask = mask & (column < D)
        values = tl.load(pointers, mask=mask, other=0.0)
    elif COLUMN + WIDTH > D:
        values = tl.load(pointers, mask=column < D, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _store(
    base, values, first, stop, STRIDE: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``_load``, in the dtype of the memory."""
    row, column = tl.arange(0, ROWS)[:, None], COLUMN + tl.arange(0, WIDTH)[None, :]
    pointers = base + first.to(tl.int64) * STRIDE + (row * STRIDE + column)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(first + row < stop) & (column < D))


@triton.jit
def _finite(values):
    """The values with 0 for NaN and infinities, which a product with 0 would keep; and per row 0, or NaN if it had any.

    A block under a mask holds rows that only some of the tile may see: a neighbour's NaN must not reach the others.
    """
    zero = values.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, values, tl.zeros_like(values)), tl.sum(zero, 1)


@triton.jit
def _products(a0, a1, b0, b1, s, D1: tl.constexpr):
    """s + a b^T over the head dim, in its two parts."""
    s = tl.dot(a0, tl.trans(b0), acc=s, out_dtype=s.dtype, input_precision="ieee")
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), acc=s, out_dtype=s.dtype, input_precision="ieee")
    return s


@triton.jit
def _fill(base, start, stop, flags, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    """0, or NaN where the layout is broken, into rows that no segment has."""
    value = tl.where((flags & BROKEN) != 0, float("nan"), 0.0)
    _store(base, value + tl.zeros([ROWS, D0], tl.float32), start, stop, STRIDE, 0, D0, D, ROWS)
    if D1 > 0:
        _store(base, value + tl.zeros([ROWS, D1], tl.float32), start, stop, STRIDE, D0, D1, D, ROWS)


@triton.jit
def _query_bounds(start, stop, token_start, token_stop, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The first and the last key of its own segments that each row sees."""
    row = start + tl.arange(0, ROWS)
    first = tl.load(token_start + row, mask=row < stop, other=0)
    if CAUSAL:
        last = row
    else:
        last = tl.load(token_stop + row, mask=row < stop, other=1) - 1
    return first, last


@triton.jit
def _query_blocks(tile, start, STEPS: tl.constexpr, CAUSAL: tl.constexpr):
    """Of a tile of queries: blocks of keys that every row sees in full, far and own; and those that want a mask."""
    far, far_stop = tl.load(tile + FAR), tl.load(tile + FAR_STOP)
    own, own_stop = tl.load(tile + OWN), tl.load(tile + OWN_STOP)
    far_full = (far_stop - far) // STEPS
    seen_by_all = (start if CAUSAL else own_stop) - own
    own_full = tl.where((tl.load(tile + FLAGS) & STRADDLES) != 0, 0, seen_by_all // STEPS)
    far_rest = tl.where(far + far_full * STEPS < far_stop, 1, 0)
    own_rest = (own_stop - own - own_full * STEPS + STEPS - 1) // STEPS
    return far, far_stop, far_full, far_rest, own, own_stop, own_full, own_rest


@triton.jit
def _attend(
    q0, q1, out0, out1, top, total, k, v, first, live, low, high, KT: tl.constexpr, VT: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the online softmax: its unnormalised output, maximum and sum (base 2)."""
    k0, v0 = _load(k, first, live, KT, 0, D0, D, STEPS, MASKED), _load(v, first, live, VT, 0, D0, D, STEPS, MASKED)
    k1, v1 = k0, v0
    if D1 > 0:
        k1, v1 = (
            _load(k, first, live, KT, D0, D1, D, STEPS, MASKED),
            _load(v, first, live, VT, D0, D1, D, STEPS, MASKED),
        )
    s = _products(q0, q1, k0, k1, tl.zeros([ROWS, STEPS], ACC), D1)
    if MASKED:
        v0, spoilt = _finite(v0)
        if D1 > 0:
            v1, more = _finite(v1)
            spoilt += more
        key = (first + tl.arange(0, STEPS))[None, :]
        s = s * (SCALE * LOG2E) + spoilt[None, :]
        s = tl.where((key >= low[:, None]) & (key <= high[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # A row may have seen no key yet.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
    else:
        highest = tl.max(s, 1) if SCALE >= 0 else tl.min(s, 1)
        higher = tl.maximum(top, highest * (SCALE * LOG2E))
        shift = higher
        p = tl.exp2(s * (SCALE * LOG2E) - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    out0 = tl.dot(p.to(v0.dtype), v0, acc=out0 * shrink[:, None], out_dtype=ACC, input_precision="ieee")
    if D1 > 0:
        out1 = tl.dot(p.to(v0.dtype), v1, acc=out1 * shrink[:, None], out_dtype=ACC, input_precision="ieee")
    return out0, out1, higher, total


@triton.jit
def _forward(
    q, k, v, out, lse, tiles, token_start, token_stop,
    QT: tl.constexpr, QH: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, VT: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of queries and a head per program."""
    tile, head = tiles + COLUMNS * tl.program_id(0), tl.program_id(1)
    start, stop, flags = tl.load(tile + START), tl.load(tile + STOP), tl.load(tile + FLAGS)
    if start >= stop:
        return
    out += head * D
    row = tl.arange(0, ROWS)
    lse_at = lse + start.to(tl.int64) * HEADS + row * HEADS + head
    live = start + row < stop
    if (flags & PADDING) != 0:
        _fill(out, start, stop, flags, HEADS * D, D, D0, D1, ROWS)
        nothing = tl.where((flags & BROKEN) != 0, float("nan"), float("-inf"))
        tl.store(lse_at, nothing + tl.zeros([ROWS], tl.float32), mask=live)
        return
    q += head * QH
    k += head // (HEADS // KV_HEADS) * KH
    v += head // (HEADS // KV_HEADS) * VH
    low, high = _query_bounds(start, stop, token_start, token_stop, ROWS, CAUSAL)
    far, far_stop, far_full, far_rest, own, own_stop, own_full, own_rest = _query_blocks(tile, start, STEPS, CAUSAL)

    q0 = _load(q, start, live, QT, 0, D0, D, ROWS, True)
    q1 = q0
    out0 = tl.zeros([ROWS, D0], ACC)
    out1 = out0
    if D1 > 0:
        q1 = _load(q, start, live, QT, D0, D1, D, ROWS, True)
        out1 = tl.zeros([ROWS, D1], ACC)
    top = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    for j in range(0, far_full + own_full):
        first = tl.where(j < far_full, far + j * STEPS, own + (j - far_full) * STEPS)
        out0, out1, top, total = _attend(
            q0, q1, out0, out1, top, total, k, v, first, live, low, high,
            KT, VT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=False,
        )  # fmt: skip
    for j in range(0, far_rest + own_rest):
        in_far = j < far_rest
        first = tl.where(in_far, far + far_full * STEPS, own + (own_full + j - far_rest) * STEPS)
        end = tl.where(in_far, far_stop, own_stop)
        out0, out1, top, total = _attend(
            q0, q1, out0, out1, top, total, k, v, first, tl.arange(0, STEPS) < end - first,
            tl.where(in_far, 0, low), tl.where(in_far, far_stop - 1, high),
            KT, VT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=True,
        )  # fmt: skip
    _store(out, out0 / total[:, None], start, stop, HEADS * D, 0, D0, D, ROWS)
    if D1 > 0:
        _store(out, out1 / total[:, None], start, stop, HEADS * D, D0, D1, D, ROWS)
    tl.store(lse_at, (top + tl.log2(total)) * LN2, mask=live)


@triton.jit
def _descend(
    q0, q1, g0, g1, lse2, delta, grad0, grad1, k, v, first, live, low, high, KT: tl.constexpr, VT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the gradient of a tile of queries (but for the factor ``scale``)."""
    k0 = _load(k, first, live, KT, 0, D0, D, STEPS, MASKED)
    v0 = _load(v, first, live, VT, 0, D0, D, STEPS, MASKED)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = _load(k, first, live, KT, D0, D1, D, STEPS, MASKED)
        v1 = _load(v, first, live, VT, D0, D1, D, STEPS, MASKED)
    p = tl.exp2(_products(q0, q1, k0, k1, tl.zeros([ROWS, STEPS], ACC), D1) * (SCALE * LOG2E) - lse2[:, None])
    ds = p * (_products(g0, g1, v0, v1, tl.zeros([ROWS, STEPS], ACC), D1) - delta[:, None])
    if MASKED:
        key = (first + tl.arange(0, STEPS))[None, :]
        ds = tl.where((key >= low[:, None]) & (key <= high[:, None]), ds, 0.0)
        k0, _ = _finite(k0)
        if D1 > 0:
            k1, _ = _finite(k1)
    ds = ds.to(k0.dtype)
    grad0 = tl.dot(ds, k0, acc=grad0, out_dtype=ACC, input_precision="ieee")
    if D1 > 0:
        grad1 = tl.dot(ds, k1, acc=grad1, out_dtype=ACC, input_precision="ieee")
    return grad0, grad1


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_queries(
    grad_out, q, k, v, out, lse, grad_q, rows, tiles, token_start, token_stop, num_tokens,
    GT: tl.constexpr, GH: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, VT: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of queries and a head per program; writes what the keys' kernel needs of each row, too."""
    tile, head = tiles + COLUMNS * tl.program_id(0), tl.program_id(1)
    start, stop, flags = tl.load(tile + START), tl.load(tile + STOP), tl.load(tile + FLAGS)
    if start >= stop:
        return
    grad_q += head * D
    if (flags & PADDING) != 0:
        _fill(grad_q, start, stop, flags, HEADS * D, D, D0, D1, ROWS)
        return
    grad_out += head * GH
    q += head * QH
    out += head * D
    k += head // (HEADS // KV_HEADS) * KH
    v += head // (HEADS // KV_HEADS) * VH
    row = tl.arange(0, ROWS)
    live = start + row < stop
    low, high = _query_bounds(start, stop, token_start, token_stop, ROWS, CAUSAL)
    far, far_stop, far_full, far_rest, own, own_stop, own_full, own_rest = _query_blocks(tile, start, STEPS, CAUSAL)

    q0 = _load(q, start, live, QT, 0, D0, D, ROWS, True)
    g0 = _load(grad_out, start, live, GT, 0, D0, D, ROWS, True)
    delta = tl.sum(g0.to(ACC) * _load(out, start, live, HEADS * D, 0, D0, D, ROWS, True).to(ACC), 1)
    q1, g1 = q0, g0
    grad0 = tl.zeros([ROWS, D0], ACC)
    grad1 = grad0
    if D1 > 0:
        q1 = _load(q, start, live, QT, D0, D1, D, ROWS, True)
        g1 = _load(grad_out, start, live, GT, D0, D1, D, ROWS, True)
        delta += tl.sum(g1.to(ACC) * _load(out, start, live, HEADS * D, D0, D1, D, ROWS, True).to(ACC), 1)
        grad1 = tl.zeros([ROWS, D1], ACC)
    lse2 = tl.load(lse + start.to(tl.int64) * HEADS + row * HEADS + head, mask=live, other=0.0) * LOG2E
    rows += head.to(tl.int64) * num_tokens + start
    tl.store(rows + row, lse2, mask=live)
    tl.store(rows + HEADS * num_tokens.to(tl.int64) + row, delta, mask=live)
    for j in range(0, far_full + own_full):
        first = tl.where(j < far_full, far + j * STEPS, own + (j - far_full) * STEPS)
        grad0, grad1 = _descend(
            q0, q1, g0, g1, lse2, delta, grad0, grad1, k, v, first, live, low, high,
            KT, VT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=False,
        )  # fmt: skip
    for j in range(0, far_rest + own_rest):
        in_far = j < far_rest
        first = tl.where(in_far, far + far_full * STEPS, own + (own_full + j - far_rest) * STEPS)
        end = tl.where(in_far, far_stop, own_stop)
        grad0, grad1 = _descend(
            q0, q1, g0, g1, lse2, delta, grad0, grad1, k, v, first, tl.arange(0, STEPS) < end - first,
            tl.where(in_far, 0, low), tl.where(in_far, far_stop - 1, high),
            KT, VT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=True,
        )  # fmt: skip
    _store(grad_q, grad0 * SCALE, start, stop, HEADS * D, 0, D0, D, ROWS)
    if D1 > 0:
        _store(grad_q, grad1 * SCALE, start, stop, HEADS * D, D0, D1, D, ROWS)


@triton.jit
def _collect(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, q, grad_out, lse2, delta, first, live, first_row,
    QT: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr, CROSSING: tl.constexpr,
):  # fmt: skip
    """One block of queries into the gradients of a tile of keys and values (dk but for the factor ``scale``).

    If CROSSING, the key of a row is seen from ``first_row`` on.
    """
    q0 = _load(q, first, live, QT, 0, D0, D, STEPS, MASKED)
    g0 = _load(grad_out, first, live, GT, 0, D0, D, STEPS, MASKED)
    q1, g1 = q0, g0
    if D1 > 0:
        q1 = _load(q, first, live, QT, D0, D1, D, STEPS, MASKED)
        g1 = _load(grad_out, first, live, GT, D0, D1, D, STEPS, MASKED)
    # Transposed, keys along the rows, so that p and ds are the left operands of the last products. Where the products
    # start from -delta (and from the log-sum-exp under a mask), the registers do not spill.
    if MASKED and SCALE != 0:
        lse = lse2 * (1.0 / (SCALE * LOG2E))
        p = tl.exp2(_products(k0, k1, q0, q1, tl.zeros([ROWS, STEPS], ACC) - lse[None, :], D1) * (SCALE * LOG2E))
    else:
        p = tl.exp2(_products(k0, k1, q0, q1, tl.zeros([ROWS, STEPS], ACC), D1) * (SCALE * LOG2E) - lse2[None, :])
    ds = p * _products(v0, v1, g0, g1, tl.zeros([ROWS, STEPS], ACC) - delta[None, :], D1)
    if CROSSING:
        seen = tl.arange(0, STEPS)[None, :] >= (first_row - first)[:, None]
        p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
    p, ds = p.to(g0.dtype), ds.to(q0.dtype)
    dv0 = tl.dot(p, g0, acc=dv0, out_dtype=ACC, input_precision="ieee")
    dk0 = tl.dot(ds, q0, acc=dk0, out_dtype=ACC, input_precision="ieee")
    if D1 > 0:
        dv1 = tl.dot(p, g1, acc=dv1, out_dtype=ACC, input_precision="ieee")
        dk1 = tl.dot(ds, q1, acc=dk1, out_dtype=ACC, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_keys(
    grad_out, q, k, v, grad_k, grad_v, rows, tiles, token_parent, num_tokens,
    GT: tl.constexpr, GH: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, VT: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of keys and a key head per program: over the query heads of its group, and over its queries."""
    tile, kv_head = tiles + COLUMNS * tl.program_id(0), tl.program_id(1)
    start, stop, flags = tl.load(tile + START), tl.load(tile + STOP), tl.load(tile + FLAGS)
    if start >= stop:
        return
    grad_k += kv_head * D
    grad_v += kv_head * D
    if (flags & PADDING) != 0:
        _fill(grad_k, start, stop, flags, KV_HEADS * D, D, D0, D1, ROWS)
        _fill(grad_v, start, stop, flags, KV_HEADS * D, D, D0, D1, ROWS)
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    q += kv_head * GROUP * QH
    grad_out += kv_head * GROUP * GH
    lse2 = rows + kv_head.to(tl.int64) * GROUP * num_tokens
    delta = lse2 + HEADS * num_tokens.to(tl.int64)
    k += kv_head * KH
    v += kv_head * VH

    far, far_stop = tl.load(tile + FAR), tl.load(tile + FAR_STOP)
    own, own_stop = tl.load(tile + OWN), tl.load(tile + OWN_STOP)
    segment = tl.load(tile + SEGMENT)
    # Blocks of queries: the far ones; then the own ones, of which the first cross the diagonal, the next do not, and
    # the last may be ragged.
    far_full = tl.where((flags & SCATTERED) != 0, 0, (far_stop - far) // STEPS)
    far_rest = (far_stop - far + STEPS - 1) // STEPS - far_full
    own_blocks = (own_stop - own + STEPS - 1) // STEPS
    crossing = tl.minimum((ROWS + STEPS - 1) // STEPS if CAUSAL else 0, own_blocks)
    own_full = tl.maximum((own_stop - own) // STEPS - crossing, 0)
    full, rest = far_full + own_full, far_rest + own_blocks - own_full

    key = start + tl.arange(0, ROWS)
    mine = key < stop
    k0 = _load(k, start, mine, KT, 0, D0, D, ROWS, True)
    v0 = _load(v, start, mine, VT, 0, D0, D, ROWS, True)
    k1, v1 = k0, v0
    dk0, dv0 = tl.zeros([ROWS, D0], ACC), tl.zeros([ROWS, D0], ACC)
    dk1, dv1 = dk0, dv0
    if D1 > 0:
        k1 = _load(k, start, mine, KT, D0, D1, D, ROWS, True)
        v1 = _load(v, start, mine, VT, D0, D1, D, ROWS, True)
        dk1, dv1 = tl.zeros([ROWS, D1], ACC), tl.zeros([ROWS, D1], ACC)
    for j in range(0, GROUP * full):
        head, block = j // full, j % full
        first = tl.where(block < far_full, far + block * STEPS, own + (crossing + block - far_full) * STEPS)
        at = head * num_tokens.to(tl.int64) + first
        column = tl.arange(0, STEPS)
        dk0, dk1, dv0, dv1 = _collect(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q + head * QH, grad_out + head * GH,
            tl.load(lse2 + at + column), tl.load(delta + at + column), first, column < STEPS, key,
            QT, GT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=False, CROSSING=False,
        )  # fmt: skip
    for j in range(0, GROUP * rest):
        head, block = j // rest, j % rest
        in_far = block < far_rest
        own_block = block - far_rest
        first = tl.where(
            in_far,
            far + (far_full + block) * STEPS,
            own + tl.where(own_block < crossing, own_block, own_full + own_block) * STEPS,
        )
        end = tl.where(in_far, far_stop, own_stop)
        column = tl.arange(0, STEPS)
        # Rows past the end, and rows between the children of a parent, see nothing: exp2(0 - inf) = 0.
        scattered = in_far & ((flags & SCATTERED) != 0)
        live = column < end - first
        live &= tl.load(token_parent + first + column, mask=live & scattered, other=segment) == segment
        at = head * num_tokens.to(tl.int64) + first
        dk0, dk1, dv0, dv1 = _collect(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q + head * QH, grad_out + head * GH,
            tl.load(lse2 + at + column, mask=live, other=float("inf")),
            tl.load(delta + at + column, mask=live, other=0.0), first, live,
            tl.where(in_far, 0, key),
            QT, GT, D, D0, D1, ROWS, STEPS, SCALE, ACC, MASKED=True, CROSSING=CAUSAL,
        )  # fmt: skip
    _store(grad_k, dk0 * SCALE, start, stop, KV_HEADS * D, 0, D0, D, ROWS)
    _store(grad_v, dv0, start, stop, KV_HEADS * D, 0, D0, D, ROWS)
    if D1 > 0:
        _store(grad_k, dk1 * SCALE, start, stop, KV_HEADS * D, D0, D1, D, ROWS)
        _store(grad_v, dv1, start, stop, KV_HEADS * D, D0, D1, D, ROWS)

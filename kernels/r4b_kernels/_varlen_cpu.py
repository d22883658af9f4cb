"""Variable-length attention on the CPU: few calls of torch's flash kernel over many segments of a flat stream.

The flash kernel wants [batch, length]. Segments of similar length are gathered into one call, padded on the right with
copies of their own first token, so that a bucket wastes little and a call costs Python only once. Long segments are
called in place, without a gather. What is called how is a plan of index tensors, made once per set of offsets: all
layers, forward and backward, run the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# From here on a call of its own costs less than the gather and the padding it saves.
LONG = 512
# Lengths in a bucket are at least this share of its longest, or within SLACK tokens of it.
FILL = 0.75
SLACK = 2


@dataclass(frozen=True)
class Bucket:
    """``count`` segments padded to ``length``, at rows ``[row, row + count * length)`` of the gathered stream."""

    row: int
    count: int
    length: int
    bias: Tensor | None  # float32 [count, 1, 1, length], -inf on padding keys; None where none can be seen


@dataclass(frozen=True)
class Plan:
    """How to run a set of segments: long ones in place, the rest gathered into buckets."""

    long: tuple[tuple[int, int], ...]
    buckets: tuple[Bucket, ...]
    rows: Tensor  # int64 [R], the token in every row of the gathered stream
    padding: Tensor  # bool [R, 1], rows that are padding
    tokens: Tensor  # int64 [M], tokens of the bucketed segments, ascending
    place: Tensor  # int64 [M], the row of each of them


def make_plan(segments: Sequence[tuple[int, int]], causal: bool) -> Plan:
    """Plan for disjoint [start, stop) segments. Empty ones need no call."""
    long = tuple((start, stop) for start, stop in segments if stop - start >= LONG)
    short = sorted((stop - start, start) for start, stop in segments if 0 < stop - start < LONG)[::-1]
    buckets, rows, row = [], [], 0
    first = 0
    while first < len(short):
        length = short[first][0]
        shortest = min(FILL * length, length - SLACK)
        last = first
        while last < len(short) and short[last][0] >= shortest:
            last += 1
        own = torch.tensor(short[first:last], dtype=torch.int64)
        column = torch.arange(length)
        valid = column < own[:, :1]
        # A causal row never sees the padding to its right; a bidirectional one must be kept from it.
        bias = None
        if not causal and not bool(valid.all()):
            bias = torch.zeros(valid.shape).masked_fill_(~valid, float("-inf"))[:, None, None, :]
        buckets.append(Bucket(row, last - first, length, bias))
        rows.append(torch.stack([torch.where(valid, own[:, 1:] + column, own[:, 1:]), valid.long()]).flatten(1))
        row += (last - first) * length
        first = last

    token_of_row, valid = torch.cat(rows, dim=1) if rows else torch.empty(2, 0, dtype=torch.int64)
    place = valid.nonzero().squeeze(1)
    tokens, order = token_of_row[place].sort()
    return Plan(long, tuple(buckets), token_of_row, ~valid.bool()[:, None], tokens, place[order])


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, causal: bool, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write the attention of the planned segments into out [T, Hq, D] and lse [T, Hq]; other rows stay untouched."""
    for start, stop in plan.long:
        out[start:stop], lse[start:stop] = attend(q[start:stop], k[start:stop], v[start:stop], causal, scale)
    if not plan.buckets:
        return
    gathered = [x.index_select(0, plan.rows) for x in (q, k, v)]
    outs, lses = [], []
    for bucket in plan.buckets:
        batch = [_rows(x, bucket).transpose(1, 2) for x in gathered]
        part, part_lse = _flash(*batch, 0.0, causal, attn_mask=_bias(bucket, q.dtype), scale=scale)
        outs.append(part.transpose(1, 2).reshape(-1, *q.shape[1:]))
        lses.append(part_lse.transpose(1, 2).reshape(-1, q.shape[1]))
    _scatter(out, torch.cat(outs), plan)
    _scatter(lse, torch.cat(lses), plan)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    causal: bool,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of the planned segments into ``grads``; other rows stay untouched.

    ``out`` and ``lse`` may be those of a softmax over more keys than the segment's own (flash attention's backward
    needs only the final ones).
    """
    for start, stop in plan.long:
        part = (x[start:stop] for x in (grad_out, q, k, v, out, lse))
        for grad, value in zip(grads, attend_backward(*part, causal, scale), strict=True):
            grad[start:stop] = value
    if not plan.buckets:
        return
    gathered = [x.index_select(0, plan.rows) for x in (grad_out, q, k, v, out, lse)]
    # exp(score - inf) = 0: a padding row gives nothing to any gradient.
    gathered[-1].masked_fill_(plan.padding, float("inf"))
    pieces: tuple[list[Tensor], ...] = ([], [], [])
    for bucket in plan.buckets:
        batch = [_rows(x, bucket).transpose(1, 2) for x in gathered]
        parts = _flash_backward(*batch, 0.0, causal, attn_mask=_bias(bucket, q.dtype), scale=scale)
        for piece, part, grad in zip(pieces, parts, grads, strict=True):
            piece.append(part.transpose(1, 2).reshape(-1, *grad.shape[1:]))
    for grad, piece in zip(grads, pieces, strict=True):
        _scatter(grad, torch.cat(piece), plan)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One segment: q [M, Hq, D] over k, v [N, Hk, D] -> out [M, Hq, D], lse [M, Hq]."""
    out, lse = _flash(*(x[None].transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attend`` to q, k and v."""
    batch = (x[None].transpose(1, 2) for x in (grad_out, q, k, v, out, lse))
    grads = _flash_backward(*batch, 0.0, causal, scale=scale)
    return tuple(grad[0].transpose(0, 1) for grad in grads)


def _rows(x: Tensor, bucket: Bucket) -> Tensor:
    return x[bucket.row : bucket.row + bucket.count * bucket.length].view(bucket.count, bucket.length, *x.shape[1:])


def _bias(bucket: Bucket, dtype: torch.dtype) -> Tensor | None:
    return None if bucket.bias is None else bucket.bias.to(dtype)


def _scatter(target: Tensor, rows: Tensor, plan: Plan) -> None:
    first, last = int(plan.tokens[0]), int(plan.tokens[-1]) + 1
    if last - first == plan.tokens.numel():
        torch.index_select(rows, 0, plan.place, out=target[first:last])
    else:
        target.index_copy_(0, plan.tokens, rows.index_select(0, plan.place))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32: more exact, and on most CPUs faster, than the kernel's own half path."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32

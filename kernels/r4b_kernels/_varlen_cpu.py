"""Variable-length attention on the CPU: few calls of torch's flash kernel over many segments of a flat stream.

The flash kernel wants [batch, length]. Segments of similar length are gathered into one call, padded on the right with
copies of their own first token, so that a bucket wastes little and a call costs Python only once. Long segments are
called in place, without a gather. What is called how is a plan of index tensors, made once per set of offsets: all
layers, forward and backward, run the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# From here on a call of its own costs less than the gather and the padding it saves.
LONG = 512
# Lengths in a bucket are at least this share of its longest, or within SLACK tokens of it.
FILL = 0.85
SLACK = 2


@dataclass(frozen=True)
class Bucket:
    """``count`` segments gathered into one call, padded on the right to ``length`` with their own first token."""

    count: int
    length: int
    source: Tensor  # int64 [count * length], the token to read into every row
    target: Tensor  # int64 [count * length], the token to write every row to; the plan's total for padding
    padding: Tensor  # bool [count * length, 1], rows that are padding
    bias: Tensor | None  # float32 [count, 1, 1, length], -inf on padding keys; None where none can be seen


@dataclass(frozen=True)
class Plan:
    """How to run a set of segments of ``[0, total)``: long ones in place, the rest gathered into buckets."""

    total: int
    long: tuple[tuple[int, int], ...]
    buckets: tuple[Bucket, ...]


def make_plan(bounds: Sequence[int], causal: bool) -> Plan:
    """Plan for the segments ``[bounds[i], bounds[i + 1])``. Empty ones need no call."""
    total = bounds[-1]
    segments = [(stop - start, start) for start, stop in zip(bounds, bounds[1:], strict=False)]
    long = tuple((start, start + length) for length, start in segments if length >= LONG)
    short = sorted((segment for segment in segments if 0 < segment[0] < LONG), reverse=True)
    buckets, first = [], 0
    while first < len(short):
        length = short[first][0]
        shortest = min(FILL * length, length - SLACK)
        last = first
        while last < len(short) and short[last][0] >= shortest:
            last += 1
        lengths, starts = torch.tensor(short[first:last], dtype=torch.int64).split(1, dim=1)
        column = torch.arange(length)
        valid = column < lengths
        # A causal row never sees the padding to its right; a bidirectional one must be kept from it.
        bias = None
        if not causal and not bool(valid.all()):
            bias = torch.zeros(valid.shape).masked_fill_(~valid, float("-inf"))[:, None, None, :]
        source = (starts + column * valid).flatten()
        target = torch.where(valid, starts + column, total).flatten()
        buckets.append(Bucket(last - first, length, source, target, ~valid.view(-1, 1), bias))
        first = last
    return Plan(total, long, tuple(buckets))


def operands(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernel wants them: half precision in float32 (more exact, and on most CPUs faster, than the
    kernel's own half path), and heads without gaps, which it takes for granted without a check."""
    wide = (x.to(accumulation_dtype(x.dtype)) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in wide]


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], lse [T, Hq]) of the planned segments; tokens after them have output 0 and lse -inf."""
    out, lse = _with_spare_row(q), _with_spare_row(q[..., 0])
    for start, stop in plan.long:
        out[start:stop], lse[start:stop] = attend(q[start:stop], k[start:stop], v[start:stop], causal, scale)
    for bucket in plan.buckets:
        batch = (_batched(x.index_select(0, bucket.source), bucket) for x in (q, k, v))
        part, part_lse = _flash(*batch, 0.0, causal, attn_mask=_bias(bucket, q.dtype), scale=scale)
        _scatter(out, part, bucket)
        _scatter(lse, part_lse, bucket)
    out[plan.total :] = 0
    lse[plan.total :] = float("-inf")
    return out[: q.shape[0]], lse[: q.shape[0]]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v through the planned segments; 0 for tokens after them.

    ``out`` and ``lse`` may be those of a softmax over more keys than the segment's own (flash attention's backward
    needs only the final ones).
    """
    grads = (_with_spare_row(q), _with_spare_row(k), _with_spare_row(v))
    for start, stop in plan.long:
        span = slice(start, stop)
        parts = attend_backward(grad_out[span], q[span], k[span], v[span], out[span], lse[span], causal, scale)
        for grad, part in zip(grads, parts, strict=True):
            grad[span] = part
    for bucket in plan.buckets:
        *rows, lse_rows = (x.index_select(0, bucket.source) for x in (grad_out, q, k, v, out, lse))
        # exp(score - inf) = 0: a padding row gives nothing to any gradient.
        lse_rows.masked_fill_(bucket.padding, float("inf"))
        batch = (_batched(x, bucket) for x in (*rows, lse_rows))
        parts = _flash_backward(*batch, 0.0, causal, attn_mask=_bias(bucket, q.dtype), scale=scale)
        for grad, part in zip(grads, parts, strict=True):
            _scatter(grad, part, bucket)
    for grad in grads:
        grad[plan.total :] = 0
    return grads[0][: q.shape[0]], grads[1][: q.shape[0]], grads[2][: q.shape[0]]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One segment: q [M, Hq, D] over k, v [N, Hk, D] -> out [M, Hq, D], lse [M, Hq]."""
    out, lse = _flash(*(x[None].transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attend`` to q, k and v."""
    batch = (x[None].transpose(1, 2) for x in (grad_out, q, k, v, out, lse))
    grad_q, grad_k, grad_v = (grad[0].transpose(0, 1) for grad in _flash_backward(*batch, 0.0, causal, scale=scale))
    return grad_q, grad_k, grad_v


def _batched(rows: Tensor, bucket: Bucket) -> Tensor:
    return rows.view(bucket.count, bucket.length, *rows.shape[1:]).transpose(1, 2)


def _bias(bucket: Bucket, dtype: torch.dtype) -> Tensor | None:
    return None if bucket.bias is None else bucket.bias.to(dtype)


def _with_spare_row(like: Tensor) -> Tensor:
    """Memory for T + 1 rows: padding goes to the row after the last segment, so that a bucket is written whole."""
    return torch.empty((like.shape[0] + 1, *like.shape[1:]), dtype=like.dtype)


def _scatter(stream: Tensor, part: Tensor, bucket: Bucket) -> None:
    stream.index_copy_(0, bucket.target, part.transpose(1, 2).reshape(-1, *stream.shape[1:]))

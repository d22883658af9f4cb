"""Triton backend of scatter_vision: one pass over memory each way, without copies to find who goes where.

Forward: a program copies a token's row from the one place where it lies. Backward: `_reach` finds the first and the
last token of every feature row; where they are one, which is the usual case, the row's gradient is a copy. The few rows
that several tokens share (a learned row separator) are summed by programs of their own, in the launch of the copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.triton_support import accumulator

BLOCK = 4096  # columns of a copy
SHARED_BLOCK = 128  # columns of a sum
SHARED_TILE = 32  # feature rows in which a program looks for shared ones
SHARED_CHUNK = 128  # tokens among which it looks for theirs at a time


class Backend:
    """The triton backend. An index outside -1 .. P-1 makes the rows that it touches NaN."""

    @staticmethod
    def forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool) -> Tensor:
        tokens, width = embeddings.shape
        out = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
        if out.numel():
            block = _block(width)
            _forward[tokens, triton.cdiv(width, block)](
                embeddings.contiguous(), features.contiguous(), index.contiguous(), out, features.shape[0],
                WIDTH=width, BLOCK=block, ACCUMULATE=accumulate, ACC=accumulator(out.dtype), num_warps=4,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool) -> tuple[Tensor, Tensor]:
        """(gradient of embeddings, empty if accumulate; gradient of features)."""
        tokens, width = grad_out.shape
        grad_out, index = grad_out.contiguous(), index.contiguous()
        grad_embeddings = grad_out.new_empty(0 if accumulate else grad_out.shape)
        grad_features = grad_out.new_empty(num_features, width)
        if not tokens or not width:
            return grad_embeddings, grad_features.zero_()
        reach = torch.zeros(2, num_features, dtype=torch.int32, device=index.device)
        if num_features:
            _reach[triton.cdiv(tokens, 256),](index, reach, tokens, num_features, BLOCK=256, num_warps=4)
        sums = triton.cdiv(num_features, SHARED_TILE) * triton.cdiv(width, SHARED_BLOCK)
        copies = num_features + (0 if accumulate else tokens)
        if sums + copies:
            block = _block(width)
            _backward[sums + copies * triton.cdiv(width, block),](
                grad_out, index, reach, grad_embeddings, grad_features, tokens, num_features, sums,
                WIDTH=width, BLOCK=block, SHARED_BLOCK=SHARED_BLOCK, SHARED_TILE=SHARED_TILE, SHARED_CHUNK=SHARED_CHUNK,
                ACC=accumulator(grad_out.dtype), num_warps=4,
            )  # fmt: skip
        return grad_embeddings, grad_features


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


@triton.jit
def _copy(source, target, column, mask):
    tl.store(target + column, tl.load(source + column, mask=mask, other=0.0), mask=mask)


@triton.jit
def _fill(target, column, mask, value: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(target + column, tl.full([BLOCK], value, tl.float32).to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    embeddings, features, index, out, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    row = tl.load(index + token).to(tl.int64)
    here, there = embeddings + token * WIDTH, features + row * WIDTH
    if row == -1:
        _copy(here, out + token * WIDTH, column, mask)
    elif (row < 0) | (row >= rows):
        _fill(out + token * WIDTH, column, mask, float("nan"), BLOCK)
    elif ACCUMULATE:
        value = tl.load(here + column, mask=mask, other=0.0).to(ACC)
        value += tl.load(there + column, mask=mask, other=0.0).to(ACC)
        tl.store(out + token * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)
    else:
        _copy(there, out + token * WIDTH, column, mask)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _reach(index, reach, tokens, rows, BLOCK: tl.constexpr):
    """reach[0, p] = tokens - the first token of feature row p, reach[1, p] = 1 + the last; both stay 0 for no token."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + token, mask=token < tokens, other=-1)
    used = (row >= 0) & (row < rows)
    # Atomics, but of integers: a maximum does not depend on the order.
    tl.atomic_max(reach + row, tokens - token, mask=used, sem="relaxed")
    tl.atomic_max(reach + rows + row, token + 1, mask=used, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "rows", "sums"])
def _backward(
    grad, index, reach, grad_embeddings, grad_features, tokens, rows, sums,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr, SHARED_TILE: tl.constexpr,
    SHARED_CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first programs sum shared feature rows, the next copy the others, the rest do the embeddings."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    column = (program - sums) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    row = (program - sums) // BLOCKS
    if program < sums:
        _sum_shared(
            grad, index, reach, grad_features, program, tokens, rows,
            WIDTH, SHARED_BLOCK, SHARED_TILE, SHARED_CHUNK, ACC,
        )  # fmt: skip
    elif row < rows:
        first = tokens - tl.load(reach + row)
        last = tl.load(reach + rows + row) - 1
        if last < 0:
            _fill(grad_features + row.to(tl.int64) * WIDTH, column, mask, 0.0, BLOCK)
        elif first == last:
            _copy(grad + last.to(tl.int64) * WIDTH, grad_features + row.to(tl.int64) * WIDTH, column, mask)
    else:
        token = (row - rows).to(tl.int64)
        fed_by = tl.load(index + token)
        if fed_by == -1:
            _copy(grad + token * WIDTH, grad_embeddings + token * WIDTH, column, mask)
        elif (fed_by < 0) | (fed_by >= rows):
            _fill(grad_embeddings + token * WIDTH, column, mask, float("nan"), BLOCK)
        else:
            _fill(grad_embeddings + token * WIDTH, column, mask, 0.0, BLOCK)


@triton.jit
def _sum_shared(
    grad, index, reach, grad_features, program, tokens, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of TILE feature rows, sum the gradients of those that several tokens share, eight tokens at a time."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    column = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    candidate = program // BLOCKS * TILE + tl.arange(0, TILE)
    first = tokens - tl.load(reach + candidate, mask=candidate < rows, other=0)
    last = tl.load(reach + rows + candidate, mask=candidate < rows, other=0) - 1
    shared = (first < last).to(tl.int32)
    rank = tl.cumsum(shared, 0) * shared
    for nth in range(1, tl.sum(shared, 0) + 1):
        row = tl.sum(tl.where(rank == nth, candidate, 0), 0)
        end = tl.sum(tl.where(rank == nth, last, 0), 0) + 1
        total = tl.zeros([8, BLOCK], dtype=ACC)
        for start in range(tl.sum(tl.where(rank == nth, first, 0), 0), end, CHUNK):
            position = start + tl.arange(0, CHUNK)
            hit = (tl.load(index + position, mask=position < end, other=-1) == row).to(tl.int32)
            order, hits = tl.cumsum(hit, 0) * hit, tl.sum(hit, 0)
            for done in range(0, hits, 8):
                wanted = done + 1 + tl.arange(0, 8)
                token = tl.sum(tl.where(order[None, :] == wanted[:, None], position[None, :], 0), 1).to(tl.int64)
                mask = (wanted <= hits)[:, None] & (column < WIDTH)[None, :]
                here = token[:, None] * WIDTH + column[None, :]
                total += tl.load(grad + here, mask=mask, other=0.0).to(ACC)
        value = tl.sum(total, 0).to(grad_features.dtype.element_ty)
        tl.store(grad_features + row.to(tl.int64) * WIDTH + column, value, mask=column < WIDTH)

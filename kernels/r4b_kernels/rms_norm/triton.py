"""Triton backend of rms_norm: rows in registers, one pass over memory each way.

A tile is one row, or several short ones. The backward walks the tiles with a number of programs that does not depend
on the device: each sums its rows' part of the weight's gradient in registers and writes it once, and a second kernel
adds the parts, always in the same order. Rows wider than WIDEST are walked in blocks, twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator, stages, sum_partials

WIDEST = 8192  # columns of a row that is held in registers
TILE = 4096  # elements of a tile, where rows are shorter
PROGRAMS = 256  # of the backward, at most: about two for each multiprocessor of an H100 or H200


class Backend:
    """The triton backend."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(result, reciprocal root mean square [..., 1])."""
        x, weight = x.contiguous(), weight.contiguous()
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype))
        rows, width = rstd.numel(), x.shape[-1]
        if x.numel():
            types = {"ACC": accumulator(x.dtype), "PRODUCT": accumulator(out.dtype)}
            if width <= WIDEST:
                per_tile, block = _tile(width)
                _forward[triton.cdiv(rows, per_tile),](
                    x, weight, out, rstd, rows, WIDTH=width, EPS=eps, ROWS=per_tile, BLOCK=block, **types,
                    num_warps=max(4, per_tile * block // 1024),
                )  # fmt: skip
            else:
                _wide_forward[rows,](
                    x, weight, out, rstd, WIDTH=width, EPS=eps, BLOCK=TILE, **types, num_warps=4
                )  # fmt: skip
        return out, rstd

    @staticmethod
    def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """(grad x, grad weight)."""
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        rows, width = rstd.numel(), x.shape[-1]
        grad_x = torch.empty_like(x)
        if not x.numel():
            return grad_x, torch.zeros_like(weight)
        types = {"ACC": accumulator(x.dtype)}
        if width <= WIDEST:
            per_tile, block = _tile(width)
            programs = _programs(triton.cdiv(rows, per_tile))
            partials = rstd.new_empty(programs, width)
            _backward[programs,](
                grad, x, weight, rstd, grad_x, partials, rows, WIDTH=width, ROWS=per_tile, BLOCK=block, **types,
                STAGES=stages(per_tile * block, grad, x), num_warps=max(4, per_tile * block // 512),
            )  # fmt: skip
        else:
            programs = _programs(triton.cdiv(rows, 64))
            partials = rstd.new_empty(programs, width)
            _wide_backward[rows,](
                grad, x, weight, rstd, grad_x, WIDTH=width, BLOCK=TILE, **types, num_warps=4
            )  # fmt: skip
            _wide_grad_weight[triton.cdiv(width, 512), programs](
                grad, x, rstd, partials, rows, WIDTH=width, ROWS=8, BLOCK=512, **types, num_warps=8
            )  # fmt: skip
        return grad_x, sum_partials(partials, weight.dtype)


def _tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile, both powers of two."""
    block = triton.next_power_of_2(width)
    return max(1, TILE // block), block


def _programs(tiles: int) -> int:
    """The fewest programs that take no more turns at the tiles than PROGRAMS of them would."""
    return triton.cdiv(tiles, triton.cdiv(tiles, PROGRAMS))


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weight, out, rstd, rows,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    here = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + here, mask=mask, other=0.0).to(ACC)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(PRODUCT)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + EPS)
    # The quotient is rounded before the weight multiplies it.
    normed = (value * inverse[:, None]).to(x.dtype.element_ty).to(PRODUCT)
    tl.store(out + here, (normed * scale[None, :]).to(out.dtype.element_ty), mask=mask)
    tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad, x, weight, rstd, grad_x, partials, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)[None, :]
    grad_weight = tl.zeros([ROWS, BLOCK], dtype=ACC)
    # Stages: the next tiles are on their way to shared memory while this one is worked on.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        here = row[:, None] * WIDTH + column[None, :]
        upstream = tl.load(grad + here, mask=mask, other=0.0).to(ACC)
        value = tl.load(x + here, mask=mask, other=0.0).to(ACC)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = value * inverse
        grad_weight += upstream * normed.to(x.dtype.element_ty).to(ACC)
        scaled = upstream * scale
        projection = tl.sum(scaled * normed, 1)[:, None] / WIDTH
        tl.store(grad_x + here, ((scaled - normed * projection) * inverse).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(partials + tl.program_id(0) * WIDTH + column, tl.sum(grad_weight, 0), mask=column < WIDTH)


@triton.jit
def _wide_forward(
    x, weight, out, rstd,
    WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(ACC)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + EPS)
    tl.store(rstd + row, inverse)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(ACC)
        scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(PRODUCT)
        normed = (value * inverse).to(x.dtype.element_ty).to(PRODUCT)
        tl.store(out + row * WIDTH + column, (normed * scale).to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _wide_backward(
    grad, x, weight, rstd, grad_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(rstd + row)
    products = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, WIDTH, BLOCK):
        scaled, normed, _ = _wide_block(grad, x, weight, row, inverse, start, WIDTH, BLOCK, ACC)
        products += scaled * normed
    projection = tl.sum(products, 0) / WIDTH
    for start in range(0, WIDTH, BLOCK):
        scaled, normed, column = _wide_block(grad, x, weight, row, inverse, start, WIDTH, BLOCK, ACC)
        value = (scaled - normed * projection) * inverse
        tl.store(grad_x + row * WIDTH + column, value.to(grad_x.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _wide_block(
    grad, x, weight, row, inverse, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(gradient by the normed values, normed values, columns) of a block of a row."""
    column = start + tl.arange(0, BLOCK)
    upstream = tl.load(grad + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(ACC)
    value = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(ACC)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)
    return upstream * scale, value * inverse, column


@triton.jit(do_not_specialize=["rows"])
def _wide_grad_weight(
    grad, x, rstd, partials, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=3):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        here = row[:, None] * WIDTH + column[None, :]
        upstream = tl.load(grad + here, mask=mask, other=0.0).to(ACC)
        value = tl.load(x + here, mask=mask, other=0.0).to(ACC)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        total += upstream * (value * inverse).to(x.dtype.element_ty).to(ACC)
    tl.store(partials + tl.program_id(1) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)

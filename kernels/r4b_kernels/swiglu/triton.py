"""Triton backend of swiglu: one pass each way, a program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.triton_support import accumulator

BLOCK = 2048


class Backend:
    """The triton backend."""

    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], width))
        if out.numel():
            block = _block(width)
            programs = out.numel() // width * triton.cdiv(width, block)
            _forward[programs,](
                gate_up.contiguous(), out, WIDTH=width, BLOCK=block, ACC=accumulator(out.dtype), num_warps=4
            )
        return out

    @staticmethod
    def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        if grad.numel():
            width = grad.shape[-1]
            block = _block(width)
            programs = grad.numel() // width * triton.cdiv(width, block)
            _backward[programs,](
                grad.contiguous(), gate_up.contiguous(), grad_gate_up,
                WIDTH=width, BLOCK=block, ACC=accumulator(gate_up.dtype), num_warps=4,
            )  # fmt: skip
        return grad_gate_up


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


@triton.jit
def _place(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(where the program's part of a row begins in [rows, WIDTH], in [rows, 2 WIDTH], its columns, which there are).

    Neighbouring programs lie in one row, so that they read neighbouring memory.
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    start = tl.program_id(0) % BLOCKS * BLOCK
    column = tl.arange(0, BLOCK)
    return row * WIDTH + start, row * (2 * WIDTH) + start, column, start + column < WIDTH


@triton.jit
def _forward(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    single, double, column, mask = _place(WIDTH, BLOCK)
    gate = tl.load(gate_up + double + column, mask=mask, other=0.0).to(ACC)
    up = tl.load(gate_up + double + WIDTH + column, mask=mask, other=0.0).to(ACC)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + single + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_out, gate_up, grad_gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    single, double, column, mask = _place(WIDTH, BLOCK)
    gate = tl.load(gate_up + double + column, mask=mask, other=0.0).to(ACC)
    up = tl.load(gate_up + double + WIDTH + column, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_out + single + column, mask=mask, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(grad_gate_up + double + column, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
    tl.store(grad_gate_up + double + WIDTH + column, (grad * gate * s).to(grad_gate_up.dtype.element_ty), mask=mask)

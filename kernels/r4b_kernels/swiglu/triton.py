"""Triton backend of swiglu: one pass each way, a program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.triton_support import accumulator

BLOCK = 1024


class Backend:
    """The triton backend."""

    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        rows = gate_up.contiguous().view(-1, gate_up.shape[-1])
        width = rows.shape[1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], width))
        if out.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _forward[rows.shape[0], triton.cdiv(width, block)](
                rows, out, width, BLOCK=block, ACC=accumulator(rows.dtype), num_warps=4
            )
        return out

    @staticmethod
    def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
        rows = gate_up.contiguous().view(-1, gate_up.shape[-1])
        width = rows.shape[1] // 2
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        if grad.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _backward[rows.shape[0], triton.cdiv(width, block)](
                grad.contiguous(), rows, grad_gate_up, width, BLOCK=block, ACC=accumulator(rows.dtype), num_warps=4
            )
        return grad_gate_up


@triton.jit
def _forward(gate_up, out, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(ACC)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(ACC)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_out, gate_up, grad_gate_up, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    here = row * 2 * width + column
    gate = tl.load(gate_up + here, mask=mask, other=0.0).to(ACC)
    up = tl.load(gate_up + here + width, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_out + row * width + column, mask=mask, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(grad_gate_up + here, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
    tl.store(grad_gate_up + here + width, (grad * gate * s).to(grad_gate_up.dtype.element_ty), mask=mask)

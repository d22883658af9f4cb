"""What the Triton backends share. Imports triton: only they may import it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype a kernel computes in, its constexpr ACC: float64 for float64 inputs (the interpreter), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stages(elements: int, *tensors: Tensor) -> int:
    """Stages of a pipeline over tiles of so many elements of each tensor; shared memory holds the tiles of all but one.

    Two tiles ahead, or one where they are large: 64 KB for two tensors, which GPUs with 99 KB a block have too.
    """
    return 3 if elements * max(x.element_size() for x in tensors) <= 16384 else 2


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sums [H] of partials [N, H], in ``dtype``; the order of the additions depends on N alone."""
    count, width = partials.shape
    total = partials.new_empty(width, dtype=dtype)
    if width:
        _sum_partials[triton.cdiv(width, 32),](
            partials, total, count, width, ROWS=128, BLOCK=32, ACC=accumulator(partials.dtype), num_warps=4
        )
    return total


@triton.jit(do_not_specialize=["count"])
def _sum_partials(  # type: ignore[no-untyped-def]
    partials, total, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    accumulated = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < width)[None, :]
        here = row.to(tl.int64)[:, None] * width + column[None, :]
        accumulated += tl.load(partials + here, mask=mask, other=0.0).to(ACC)
    tl.store(total + column, tl.sum(accumulated, 0).to(total.dtype.element_ty), mask=column < width)

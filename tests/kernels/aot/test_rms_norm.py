"""The Triton rms_norm compiles for sm_90a without spilling and moves 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.rms_norm.triton import Backend
from tests.kernels.aot.record import SMALL_SHARED_LIMIT, meta

# Trunks of 8B and 4B, their head norms, and the widest row that is held in registers.
SHAPES = [(8192, 4096), (8192, 2560), (131072, 128), (2048, 8192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, recording) -> None:
    x, weight = meta(*shape, dtype=dtype), meta(shape[1], dtype=dtype)
    with recording() as kernels:
        out, rstd = Backend.forward(x, weight, 1e-6)
        Backend.backward(out, x, weight, rstd)
    assert [kernel.kernel for kernel in kernels] == ["_forward", "_backward", "_sum_partials"]
    for kernel, tensors in zip(kernels, (1, 2, 0), strict=True):
        kernel.assert_sound()
        assert kernel.shared <= SMALL_SHARED_LIMIT
        # The elements a tile has of each tensor at least, all in loads of 16 bytes a thread.
        assert kernel.wide_loads * 16 * 32 * kernel.warps >= tensors * max(4096, shape[1]) * dtype.itemsize
    # The next tiles are fetched while one is worked on, by two programs on every multiprocessor (one of the widest).
    backward = kernels[1]
    assert backward.async_copies > 0 and backward.registers * 32 * backward.warps <= 65536 // (
        1 + (backward.warps <= 8)
    )


def test_bfloat16_with_a_float32_weight(recording) -> None:
    x, weight = meta(8192, 4096), meta(4096, dtype=torch.float32)
    with recording() as kernels:
        out, rstd = Backend.forward(x, weight, 1e-6)
        Backend.backward(out, x, weight, rstd)
    for kernel in kernels:
        kernel.assert_sound()


def test_rows_wider_than_the_registers(recording) -> None:
    x, weight = meta(4096, 16384), meta(16384)
    with recording() as kernels:
        out, rstd = Backend.forward(x, weight, 1e-6)
        Backend.backward(out, x, weight, rstd)
    names = ["_wide_forward", "_wide_backward", "_wide_grad_weight", "_sum_partials"]
    assert [kernel.kernel for kernel in kernels] == names
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.wide_loads > 0

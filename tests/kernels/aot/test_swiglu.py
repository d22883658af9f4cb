"""The Triton swiglu compiles for sm_90a without spilling, with 16 bytes a load and enough of them on the way."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.swiglu.triton import BLOCK, Backend
from tests.kernels.aot.record import meta


# Feed-forward widths of the 8B and 4B trunks, and a multiple of 8 that is none of 16.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(12288, torch.bfloat16), (9728, torch.bfloat16), (3080, torch.bfloat16), (12288, torch.float32)],
    ids=str,
)
def test_swiglu(width: int, dtype: torch.dtype, recording) -> None:
    gate_up, grad = meta(8192, 2 * width, dtype=dtype), meta(8192, width, dtype=dtype)
    with recording() as kernels:
        Backend.forward(gate_up)
        Backend.backward(grad, gate_up)
    assert [kernel.kernel for kernel in kernels] == ["_forward", "_backward"]
    for kernel, tensors in zip(kernels, (2, 3), strict=True):
        kernel.assert_sound()
        size = tensors * BLOCK * dtype.itemsize
        assert kernel.wide_loads * 16 * 32 * kernel.warps >= size
        # Latency is hidden by bytes on their way: 4.8 TB/s and 1 us are 36 KB on each of 132 multiprocessors.
        programs = min(65536 // (kernel.registers * 32 * kernel.warps), 64 // kernel.warps)
        assert programs * size >= 40 * 1024, kernel

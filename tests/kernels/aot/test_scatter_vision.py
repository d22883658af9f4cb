"""The Triton scatter_vision compiles for sm_90a without spilling, 16 bytes a load and enough of them on the way."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.scatter_vision.triton import Backend
from tests.kernels.aot.record import meta


@pytest.mark.parametrize(
    ("width", "dtype"), [(4096, torch.bfloat16), (2560, torch.bfloat16), (4096, torch.float32)], ids=str
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_scatter_vision(width: int, dtype: torch.dtype, accumulate: bool, recording) -> None:
    tokens = meta(16384, width, dtype=dtype)
    index = meta(16384, dtype=torch.int64)
    with recording() as kernels:
        Backend.forward(tokens, meta(8192, width, dtype=dtype), index, accumulate)
        Backend.backward(tokens, index, 8192, accumulate)
    assert [kernel.kernel for kernel in kernels] == ["_forward", "_reach", "_backward"]
    for kernel, columns in zip(kernels, (width, 0, width), strict=True):
        kernel.assert_sound()
        # A row, from either side, in loads of 16 bytes a thread.
        assert kernel.wide_loads * 16 * 32 * kernel.warps >= 2 * columns * dtype.itemsize
        # Latency is hidden by bytes on their way: 4.8 TB/s and 1 us are 36 KB on each of 132 multiprocessors.
        programs = min(65536 // (kernel.registers * 32 * kernel.warps), 64 // kernel.warps)
        assert columns == 0 or programs * columns * dtype.itemsize >= 40 * 1024, kernel

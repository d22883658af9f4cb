"""The Triton merge_norm compiles for sm_90a without spilling and moves 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.merge_norm.triton import Backend
from tests.kernels.aot.record import SMALL_SHARED_LIMIT, meta

ORDER = ["_find_owners", "_mark_homeless"]
# C of Qwen3-VL's ViTs (1152, and 1024 for its 2B and 4B) and of R-4B's, and the widest merged row held in registers.
CASES = {
    "merger": (1152, False, False, torch.bfloat16),
    "merger ordered": (1152, False, True, torch.bfloat16),
    "merger float32": (1152, False, False, torch.float32),
    "deepstack": (1152, True, False, torch.bfloat16),
    "deepstack ordered": (1152, True, True, torch.bfloat16),
    "deepstack float32": (1152, True, False, torch.float32),
    "small merger": (1024, False, False, torch.bfloat16),
    "widest": (2048, True, False, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_norm(case: str, recording) -> None:
    width, norm_merged, ordered, dtype = CASES[case]
    x, weight = meta(16384, width, dtype=dtype), meta(4 * width if norm_merged else width, dtype=dtype)
    order = meta(16384, dtype=torch.int64) if ordered else None
    with recording() as kernels:
        out, mean, rstd = Backend.forward(x, weight, weight, order, 4, 1e-6)
        Backend.backward(out, x, weight, mean, rstd, order)
    assert [kernel.kernel for kernel in kernels] == ["_forward", *ORDER * ordered, "_backward", "_sum_partials"]
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.shared <= SMALL_SHARED_LIMIT
    # A tile has 2 patches or 4 at least; of them the backward reads x and its gradient, in loads of 16 bytes a thread.
    size = (4 if norm_merged else 2) * width * dtype.itemsize
    for kernel, tensors in ((kernels[0], 1), (kernels[-2], 2)):
        assert kernel.wide_loads * 16 * 32 * kernel.warps >= tensors * size
    # The next tiles are fetched while one is worked on, by two programs on every multiprocessor (one of the largest).
    backward = kernels[-2]
    assert backward.async_copies > 0 and backward.registers * 32 * backward.warps <= 65536 // (
        1 + (backward.warps <= 8)
    )

"""The Triton draw_tokens compiles for sm_90a without spilling, and reads 16 bytes a thread."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.draw_tokens.triton import Backend
from tests.kernels.aot.record import SMALL_SHARED_LIMIT, meta


@pytest.mark.parametrize(
    ("forced", "temperature", "top_p"), [(True, 1.0, 1.0), (False, 0.7, 0.9), (True, 0.0, 1.0)], ids=str
)
def test_draw_tokens(forced: bool, temperature: float, top_p: float, recording) -> None:
    rows = 64
    logits, point = meta(rows, 151936, dtype=torch.float32), meta(rows, dtype=torch.float64)
    tokens = meta(rows, dtype=torch.int64) if forced else None
    with recording() as kernels:
        Backend.forward(logits, point, tokens, temperature, top_p)
    assert [kernel.kernel for kernel in kernels] == ["_sum_blocks", "_draw"]
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.shared <= SMALL_SHARED_LIMIT
    assert kernels[0].wide_loads * 16 * 32 * kernels[0].warps == 4096 * 4

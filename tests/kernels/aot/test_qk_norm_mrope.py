"""The Triton qk_norm_mrope compiles for sm_90a without spilling."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.qk_norm_mrope import pair_axes
from r4b_kernels.qk_norm_mrope.triton import Backend
from tests.kernels.aot.record import meta

TOKENS = 8192


@pytest.mark.parametrize(
    ("hq", "hk", "dim", "dtype"),
    [(32, 8, 128, torch.bfloat16), (32, 8, 128, torch.float32), (16, 16, 72, torch.bfloat16)],
    ids=["8B-bfloat16", "8B-float32", "D72-bfloat16"],
)
def test_qk_norm_mrope(hq: int, hk: int, dim: int, dtype: torch.dtype, recording) -> None:
    """q and k are slices of one projection, with interleaved sections."""
    joint = meta(TOKENS, hq + 2 * hk, dim, dtype=dtype)
    q, k, _ = joint.split([hq, hk, hk], dim=1)
    rest = (meta(dim, dtype=dtype), meta(dim, dtype=dtype), meta(3, TOKENS, dtype=torch.int64), 5e6)
    third = dim // 6
    axes = pair_axes(dim, [dim // 2 - 2 * third, third, third], True)
    with recording() as kernels:
        Backend.forward(q, k, *rest, axes, 1e-6)
        Backend.backward(
            meta(TOKENS, hq, dim, dtype=dtype), meta(TOKENS, hk, dim, dtype=dtype), q, k, *rest, axes, 1e-6
        )
    assert [kernel.kernel for kernel in kernels] == ["_forward", "_backward", "_sum_partials", "_sum_partials"]
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.wide_loads > 0 or dim == 72, kernel


def test_float64_compiles(recording) -> None:
    """Slowly, and with the library's table for large angles in local memory: for comparisons, not for training."""
    x, weight = meta(64, 2, 32, dtype=torch.float64), meta(32, dtype=torch.float64)
    with recording() as kernels:
        Backend.forward(x, x, weight, weight, meta(3, 64, dtype=torch.int64), 1e4, [], 1e-6)
        Backend.backward(x, x, x, x, weight, weight, meta(3, 64, dtype=torch.int64), 1e4, [], 1e-6)
    assert len(kernels) == 4

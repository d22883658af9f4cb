"""The Triton prefix_attention compiles for sm_90a: no spill, all products wgmma, asynchronous copies."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.prefix_attention.triton import Backend
from tests.kernels.aot.record import meta

SCHEDULE = {"_describe", "_find_runs", "_cut_runs", "_order"}
TOKENS, SEGMENTS = 17056, 17


def launch(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v, grad = (meta(TOKENS, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads, heads))
    offsets, parent = meta(SEGMENTS + 1, dtype=torch.int32), meta(SEGMENTS, dtype=torch.int32)
    lse = meta(TOKENS, heads, dtype=torch.float32)
    Backend.forward(q, k, v, offsets, parent, head_dim**-0.5)
    Backend.backward(grad, q, k, v, q, lse, offsets, parent, head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (32, 64, 72, 80, 96, 256))])
def test_bfloat16(head_dim: int, recording) -> None:
    with recording() as kernels:
        launch(head_dim, 32, 8, torch.bfloat16)
    seen = {kernel.kernel for kernel in kernels}
    assert seen == SCHEDULE | {"_forward", "_backward_queries", "_backward_keys"}
    for kernel in kernels:
        # At D = 256 the keys' kernel holds 32 rows: wgmma wants 64.
        if kernel.kernel in SCHEDULE or (head_dim == 256 and kernel.kernel == "_backward_keys"):
            kernel.assert_sound()
        else:
            kernel.assert_fast_matrices()

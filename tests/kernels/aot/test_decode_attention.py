"""The Triton decode_attention compiles for sm_90a without spilling, in shared memory that small GPUs have, too."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.decode_attention.triton import Backend
from tests.kernels.aot.record import SHARED_LIMIT, SMALL_SHARED_LIMIT, Resources, meta


def compiled(recording, share: int, dim: int, dtype: torch.dtype, longest: int) -> list[Resources]:
    rows, heads, prompts, columns = 64, 8, 8, 648

    def like(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=dtype)

    def whole(size: int) -> torch.Tensor:
        return meta(size, dtype=torch.int64)

    caches = like(heads, prompts, dim, longest), like(heads, prompts, longest, dim)
    own = like(heads, rows, dim, columns), like(heads, rows, columns, dim)
    assert Backend.refuses(caches[1], own[1]) is None
    with recording() as kernels:
        Backend.forward(
            like(rows, heads, share + 2, dim), like(dim), like(dim), like(2, rows, dim), whole(rows), *caches,
            whole(prompts), whole(prompts + 1), *own, 1e-6, dim**-0.5,
        )  # fmt: skip
    assert [kernel.kernel for kernel in kernels] == ["_append", "_attend", "_merge"]
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.shared <= (SMALL_SHARED_LIMIT if dim <= 128 else SHARED_LIMIT), kernel
    return kernels


# Heads of the 4B and 8B trunks, padded ones, whose prompts are no whole vectors, and the widest.
@pytest.mark.parametrize(
    ("share", "dim", "longest", "dtype"),
    [(4, 128, 1000, torch.bfloat16), (7, 72, 1001, torch.float32), (8, 256, 1000, torch.bfloat16)],
    ids=str,
)
def test_decode_attention(share: int, dim: int, longest: int, dtype: torch.dtype, recording) -> None:
    _, attend, merge = compiled(recording, share, dim, dtype, longest)
    assert merge.wide_loads > 0
    if dtype == torch.bfloat16:
        # Of 64 queries, and of 16, for which wgmma has no form.
        assert attend.hgmma > 0 and attend.hmma > 0
        # Keys and values of both kinds, 16 bytes a thread, while those before are multiplied.
        assert 0 < attend.async_copies <= attend.wide_loads

"""The Triton group_advantage compiles for sm_90a without spilling."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.group_advantage import BASELINES
from r4b_kernels.group_advantage.triton import forward
from tests.kernels.aot.record import meta

GROUPS, RESPONSES, TOKENS = 256, 4096, 1 << 20


@pytest.mark.parametrize(
    ("baseline", "dtype"), [*((baseline, torch.float32) for baseline in BASELINES), ("union", torch.bfloat16)], ids=str
)
def test_group_advantage(baseline: str, dtype: torch.dtype, recording) -> None:
    rewards, mode = meta(RESPONSES, dtype=dtype), meta(RESPONSES, dtype=torch.int64)
    offsets, tokens = meta(GROUPS + 1, dtype=torch.int32), meta(RESPONSES + 1, dtype=torch.int32)
    with recording() as kernels:
        forward(rewards, offsets, mode, baseline, True, 1e-6, tokens, TOKENS)
    assert [kernel.kernel for kernel in kernels] == ["_advantages", "_list_live"]
    for kernel in kernels:
        kernel.assert_sound()


def test_without_tokens(recording) -> None:
    rewards, mode = meta(RESPONSES, dtype=torch.float32), meta(RESPONSES, dtype=torch.bool)
    with recording() as kernels:
        forward(rewards, meta(GROUPS + 1, dtype=torch.int64), mode, "union", False, 1e-6, None, 0)
    for kernel in kernels:
        kernel.assert_sound()

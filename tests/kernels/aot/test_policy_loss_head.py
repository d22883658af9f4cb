"""The Triton policy_loss_head compiles for sm_90a without spilling, at the real vocabulary."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.policy_loss_head.reference import Objective, Rows
from r4b_kernels.policy_loss_head.triton import forward
from tests.kernels.aot.record import meta

VOCABULARY = 151936


@pytest.mark.parametrize("reference", [False, True], ids=["no_kl", "kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_policy_loss_head(dtype: torch.dtype, reference: bool, recording) -> None:
    tokens, width = 1664, 4096
    hidden, weight = meta(tokens, width, dtype=dtype), meta(VOCABULARY, width, dtype=dtype)
    row = meta(tokens, dtype=torch.float32)
    rows = Rows(meta(tokens, dtype=torch.int64), row, row, row, row if reference else None)
    with recording() as kernels:
        results = forward(hidden, weight, rows, Objective(0.2, 0.28, 0.05, 0.7), None, True, True)
    assert results[-2].shape == hidden.shape and results[-1].dtype == torch.float32
    passes = ["_reduce", "_score", "_differentiate"] if dtype == torch.float16 else ["_reduce", "_score"]
    assert [kernel.kernel for kernel in kernels] == passes
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.registers <= 128, "two programs of 8 warps must fit a multiprocessor"

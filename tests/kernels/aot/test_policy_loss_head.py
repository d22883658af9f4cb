"""The Triton policy_loss_head compiles for sm_90a without spilling, at the real vocabulary."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.linear_logprob.triton import _reduce
from r4b_kernels.policy_loss_head.reference import Objective, Rows
from r4b_kernels.policy_loss_head.triton import _score, forward
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


def test_other_lengths_compile_nothing_new(recording) -> None:
    def compiled(tokens: int) -> list[int]:
        row, target = meta(tokens, dtype=torch.float32), meta(tokens, dtype=torch.int64)
        rows = Rows(target, row, row, row, None)
        with recording():
            forward(meta(tokens, 64), meta(1024, 64), rows, Objective(0.2, 0.28, 0.0, 1.0), None, True, True)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in (_reduce, _score)]

    assert compiled(1664) == compiled(1665) == compiled(77)

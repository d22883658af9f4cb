"""The Triton linear_logprob compiles for sm_90a without spilling, at the real vocabulary."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.linear_logprob.triton import Backend
from tests.kernels.aot.record import meta

VOCABULARY = 151936


@pytest.mark.parametrize(("tokens", "width"), [(1664, 4096), (1000, 2560)], ids=["8b", "4b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_logprob(dtype: torch.dtype, tokens: int, width: int, recording) -> None:
    hidden, weight = meta(tokens, width, dtype=dtype), meta(VOCABULARY, width, dtype=dtype)
    target, row = meta(tokens, dtype=torch.int64), meta(tokens, dtype=torch.float32)
    with recording() as kernels:
        logprob, entropy, logsumexp = Backend.forward(hidden, weight, target, 1.0, None)
        head = hidden, weight, target, logsumexp, entropy
        grad_hidden, grad_weight = Backend.backward(row, row, *head, 1.0, None, True, True)
        Backend.backward(row, None, *head, 0.7, None, True, False)
    assert logprob.shape == (tokens,) and grad_hidden.shape == hidden.shape and grad_weight.dtype == dtype
    assert [kernel.kernel for kernel in kernels] == ["_reduce", "_differentiate", "_differentiate"]
    for kernel in kernels:
        kernel.assert_sound()
        assert kernel.registers <= 128, "two programs of 8 warps must fit a multiprocessor"

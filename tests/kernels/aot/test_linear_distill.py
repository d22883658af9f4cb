"""The Triton linear_distill compiles for sm_90a without spilling, at the shapes it is for."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.linear_distill.reference import Objective, Rows
from r4b_kernels.linear_distill.triton import Backend
from tests.kernels.aot.record import meta

VOCABULARY = 151936


def rows(tokens: int, slots: int) -> Rows:
    ids = meta(tokens, slots, dtype=torch.int64)
    return Rows(ids, meta(tokens, slots, dtype=torch.float32), meta(tokens, dtype=torch.float32))


@pytest.mark.parametrize(
    ("tail", "dtype", "width", "slots", "divergence"),
    [
        (True, torch.bfloat16, 4096, 64, "forward_kl"),
        (True, torch.bfloat16, 2560, 256, "jsd"),
        (True, torch.bfloat16, 2560, 1024, "jsd"),
        (True, torch.float32, 2560, 20, "reverse_kl"),
        (False, torch.bfloat16, 4096, 64, "reverse_kl"),
        (False, torch.bfloat16, 2560, 256, "jsd"),
    ],
    ids=str,
)
def test_linear_distill(tail: bool, dtype: torch.dtype, width: int, slots: int, divergence: str, recording) -> None:
    hidden, weight = meta(1024, width, dtype=dtype), meta(VOCABULARY, width, dtype=dtype)
    objective = Objective(divergence, 0.5, 0.7, tail)
    with recording() as kernels:
        out = Backend.forward(hidden, weight, rows(1024, slots), objective, None, True, True)
    assert [tuple(x.shape) for x in out[5:]] == [(1024, width), (VOCABULARY, width)]
    passes = ["_move", "_reduce", "_score", "_move"]
    listed = ["_dot_listed", "_score", "_grad_hidden_listed", "_grad_weight_listed"]
    assert [kernel.kernel for kernel in kernels] == (passes if tail else listed)
    for kernel in kernels:
        kernel.assert_sound()


def test_float16_takes_a_second_pass(recording) -> None:
    hidden, weight = meta(1024, 2560, dtype=torch.float16), meta(VOCABULARY, 2560, dtype=torch.float16)
    with recording() as kernels:
        Backend.forward(hidden, weight, rows(1024, 64), Objective("jsd", 0.5, 1.0, True), None, True, True)
    assert [kernel.kernel for kernel in kernels] == ["_move", "_reduce", "_score", "_differentiate", "_move"]
    for kernel in kernels:
        kernel.assert_sound()

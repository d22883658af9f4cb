"""draw_tokens in C++, on a GPU in Triton, against the torch that serves without it, as an engine calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.kernels._machine import DEVICE, ON_GPU, on
from r4b_kernels import dispatch, native

_REASON = None if ON_GPU else native.cpu_available(DEVICE)
OURS, COMPOSED = on(("native", "cpu"), ("triton", "torch"))
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize(
    ("rows", "vocabulary"), on([(8, 63), (128, 63), (8, 151936)], [(8, 151936), (128, 151936), (1024, 151936)])
)
def test_draw_tokens(rows: int, vocabulary: int, top_p: float, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    inputs = 3 * torch.randn(rows, vocabulary), torch.rand(rows, dtype=torch.float64), None, 1.0, top_p
    ours, composed = (
        partial(dispatch.resolve("draw_tokens", DEVICE, name, inputs[0]).forward, *inputs) for name in (OURS, COMPOSED)
    )
    torch.testing.assert_close(ours()[2], composed()[2], rtol=1e-5, atol=1e-5)
    size = rows * vocabulary
    contest(ours, {"composed torch": composed}, bytes_moved=4 * size, flops=20 * size)

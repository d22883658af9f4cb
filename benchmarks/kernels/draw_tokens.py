"""draw_tokens in C++ against the composed torch that serves without it, called as an engine calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.kernels._machine import ON_GPU
from r4b_kernels import dispatch, native

CPU = torch.device("cpu")
_REASON = "there is no GPU backend" if ON_GPU else native.cpu_available(CPU)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize(("rows", "vocabulary"), [(8, 63), (128, 63), (8, 151936)])
def test_draw_tokens(rows: int, vocabulary: int, top_p: float, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    inputs = 3 * torch.randn(rows, vocabulary), torch.rand(rows, dtype=torch.float64), None, 1.0, top_p
    ours, composed = (
        partial(dispatch.resolve("draw_tokens", CPU, name, inputs[0]).forward, *inputs) for name in ("native", "cpu")
    )
    torch.testing.assert_close(ours()[2], composed()[2], rtol=1e-5, atol=1e-5)
    size = rows * vocabulary
    contest(ours, {"composed torch": composed}, bytes_moved=4 * size, flops=20 * size)

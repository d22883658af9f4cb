"""decode_attention in C++, on a GPU in Triton, against the torch that serves without it, as an engine calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.kernels._machine import DEVICE, DTYPE, ON_GPU, on
from r4b_kernels import dispatch, native

_REASON = None if ON_GPU else native.cpu_available(DEVICE)
OURS, COMPOSED = on(("native", "cpu"), ("triton", "torch"))
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

# Prompts, rows per prompt, Hk, s, D, tokens of a prompt, of a response: the demo's group and 16 of them, a 4B's layer.
CASES = on(
    {
        "one-group": (1, 8, 2, 2, 32, 25, 20),
        "16-groups": (16, 8, 2, 2, 32, 25, 20),
        "long": (4, 8, 2, 2, 64, 500, 300),
        "4B": (2, 8, 8, 4, 128, 300, 100),
    },
    {
        "4B-one-group": (1, 8, 8, 4, 128, 1000, 500),
        "4B-16-groups": (16, 8, 8, 4, 128, 1000, 500),
        "4B-long": (16, 16, 8, 4, 128, 2000, 4000),
        "small": (64, 16, 8, 2, 64, 500, 500),
    },
)


@pytest.mark.parametrize("case", CASES)
def test_decode_attention(case: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    prompts, each, heads, share, dim, length, written = CASES[case]
    rows, longest, own = prompts * each, length + -length % 8, 2 * written
    angle = torch.rand(rows, dim // 2, dtype=DTYPE)
    cos, sin = angle.cos(), angle.sin()
    inputs = (
        torch.randn(rows, heads, share + 2, dim, dtype=DTYPE),
        torch.ones(dim, dtype=DTYPE),
        torch.ones(dim, dtype=DTYPE),
        torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]),
        torch.full((rows,), written - 1),
        torch.randn(heads, prompts, dim, longest, dtype=DTYPE),
        torch.randn(heads, prompts, longest, dim, dtype=DTYPE),
        torch.full((prompts,), length),
        torch.arange(0, rows + 1, each),
        torch.randn(heads, rows, dim, own, dtype=DTYPE),
        torch.randn(heads, rows, own, dim, dtype=DTYPE),
        1e-6,
        dim**-0.5,
    )
    ours, composed = (
        partial(dispatch.resolve("decode_attention", DEVICE, name, inputs[6], inputs[10]).forward, *inputs)
        for name in (OURS, COMPOSED)
    )
    tolerance = on(1e-4, 2e-2)
    torch.testing.assert_close(ours(), composed(), rtol=tolerance, atol=tolerance)
    keys = prompts * length + rows * written
    contest(
        ours,
        {"composed torch": composed},
        bytes_moved=DTYPE.itemsize * heads * dim * (2 * keys + rows * (2 * share + 2)),
        flops=4 * rows * heads * share * dim * (length + written),
    )

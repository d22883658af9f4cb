"""decode_attention in C++ against the composed torch that serves without it, called as an engine calls them."""

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

# Prompts, rows per prompt, Hk, s, D, tokens of a prompt, of a response: the demo's group and 16 of them, a 4B's layer.
CASES = {
    "one-group": (1, 8, 2, 2, 32, 25, 20),
    "16-groups": (16, 8, 2, 2, 32, 25, 20),
    "long": (4, 8, 2, 2, 64, 500, 300),
    "4B": (2, 8, 8, 4, 128, 300, 100),
}


@pytest.mark.parametrize("case", CASES)
def test_decode_attention(case: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    prompts, each, heads, share, dim, length, written = CASES[case]
    rows, longest, own = prompts * each, length + -length % 8, 2 * written
    angle = torch.rand(rows, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    inputs = (
        torch.randn(rows, heads, share + 2, dim),
        torch.ones(dim),
        torch.ones(dim),
        torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]),
        torch.full((rows,), written - 1),
        torch.randn(heads, prompts, dim, longest),
        torch.randn(heads, prompts, longest, dim),
        torch.full((prompts,), length),
        torch.arange(0, rows + 1, each),
        torch.randn(heads, rows, dim, own),
        torch.randn(heads, rows, own, dim),
        1e-6,
        dim**-0.5,
    )
    ours, composed = (
        partial(dispatch.resolve("decode_attention", CPU, name, inputs[6], inputs[10]).forward, *inputs)
        for name in ("native", "cpu")
    )
    torch.testing.assert_close(ours(), composed(), rtol=1e-4, atol=1e-4)
    keys = prompts * length + rows * written
    contest(
        ours,
        {"composed torch": composed},
        bytes_moved=4 * heads * dim * (2 * keys + rows * (2 * share + 2)),
        flops=4 * rows * heads * share * dim * (length + written),
    )

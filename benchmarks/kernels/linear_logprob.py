"""linear_logprob against the composition that keeps the logits, TRL, CCE, and the bare matrix products."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from r4b_kernels import linear_logprob

LOADS = on(
    {"T1500_H128_V64": (1500, 128, 64), "T512_H256_V32768": (512, 256, 32768)},
    {"T8192_H4096_V151936": (8192, 4096, 151936), "T8192_H2560_V151936": (8192, 2560, 151936)},
)


def composed(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def bare_products(hidden: Tensor, weight: Tensor, backward: bool) -> Callable[[], object]:
    """The matrix products of the recomputing form and nothing else: one forward, three backward."""
    h, w = hidden.detach(), weight.detach()

    def run() -> object:
        z = h @ w.T
        if not backward:
            return z
        torch.mm(h, w.T, out=z)
        return z @ w, z.T @ h

    return run


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("load", LOADS)
def test_linear_logprob(load: str, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    tokens, width, vocabulary = LOADS[load]
    hidden = torch.randn(tokens, width, dtype=DTYPE, requires_grad=True)
    weight = (torch.randn(vocabulary, width, dtype=DTYPE) / width**0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,))
    seed = torch.randn(tokens)

    def timed(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(lambda: function(hidden, weight, target))
        return lambda: torch.autograd.grad(function(hidden, weight, target)[0], (hidden, weight), seed)

    with torch.no_grad():
        pairs = zip(linear_logprob(hidden, weight, target), composed(hidden, weight, target), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=on(1e-5, 1e-2), atol=on(1e-5, 5e-2))
    rivals = {
        "torch composed": timed(composed),
        "bare products": bare_products(hidden, weight, step == "forward_backward"),
    }
    if importlib.util.find_spec("trl"):
        from trl.kernels import ChunkedLogProbFunction

        rivals["TRL chunked"] = timed(
            lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 4096, None, 1.0, ("entropy",))[:2]
        )
    if ON_GPU and importlib.util.find_spec("cut_cross_entropy"):
        cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        rivals["CCE, without entropy"] = timed(lambda h, w, t: (-cce(h, w, t, reduction="none"),))
    products = 1 if step == "forward" else 4
    size = hidden.nbytes + weight.nbytes
    contest(
        timed(linear_logprob),
        rivals,
        bytes_moved=size if step == "forward" else 4 * size,
        flops=2 * products * tokens * width * vocabulary,
    )

"""linear_logprob against heads of others that keep no logits either: TRL's chunked one and cut cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import linear_logprob


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """float32 results and gradients, to a few roundings of their largest entry."""
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=3e-6 * float(expected.detach().abs().max()))


def head(rows: int = 37, width: int = 24, vocabulary: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(vocabulary, (rows,))
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) / 2
    return hidden.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("with_entropy", [False, True])
def test_trl_chunked_logprobs(with_entropy: bool) -> None:
    """Tiles of 100 columns, so that the online statistics cross tiles and the last tile is short."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is an oracle, not a dependency")
    *inputs, target = head()
    seeds = [torch.randn(37) for _ in range(2 if with_entropy else 1)]
    kept = ("entropy",) if with_entropy else ()
    theirs = chunked.ChunkedLogProbFunction.apply(*inputs, None, target, 0.7, 100, None, 1.0, kept)[: len(seeds)]
    ours = linear_logprob(*inputs, target, temperature=0.7)[: len(seeds)]
    assert_same(
        (*ours, *torch.autograd.grad(ours, inputs, seeds)), (*theirs, *torch.autograd.grad(theirs, inputs, seeds))
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cut_cross_entropy(reduction: str) -> None:
    """Its torch implementation, run without compiling; ignored labels are its -100 and any negative id of ours."""
    cce = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is an oracle, not a dependency")
    *inputs, target = head()
    target[::5] = -100
    with torch.compiler.set_stance("force_eager"):
        theirs = cce.linear_cross_entropy(*inputs, target, impl="torch_compile", reduction=reduction)
    losses = -linear_logprob(*inputs, target)[0]
    ours = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (target >= 0).sum()}[reduction]
    seed = torch.randn_like(theirs)
    assert_same((ours, *torch.autograd.grad(ours, inputs, seed)), (theirs, *torch.autograd.grad(theirs, inputs, seed)))

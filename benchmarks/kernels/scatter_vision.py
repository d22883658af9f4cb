"""scatter_vision against the boolean-mask indexing that models use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, on
from benchmarks.kernels._step import STEPS, timed
from r4b_kernels import scatter_vision

WIDTH = on(256, 4096)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("accumulate", [False, True], ids=["replace", "deepstack_add"])
@pytest.mark.parametrize("run", [64, 1], ids=["runs_of_64", "runs_of_1"])
def test_scatter_vision(run: int, accumulate: bool, step: str, contest: Callable[..., None]) -> None:
    """Every fourth token (on a GPU every second) belongs to an image, in runs."""
    torch.manual_seed(0)
    features_count, every = on((2048, 4), (8192, 2))
    index = torch.full((every * features_count,), -1)
    index.view(-1, every * run)[:, :run] = torch.arange(features_count).view(-1, run)
    inputs = tuple(torch.randn(count, WIDTH, dtype=DTYPE, requires_grad=True) for count in (len(index), features_count))
    grad = torch.randn(len(index), WIDTH, dtype=DTYPE)
    mask = index >= 0

    def ours(embeddings: Tensor, features: Tensor) -> Tensor:
        return scatter_vision(embeddings, features, index, accumulate=accumulate)

    def boolean_mask(embeddings: Tensor, features: Tensor) -> Tensor:
        out = embeddings.clone()
        out[mask] = out[mask] + features if accumulate else features
        return out

    def masked_scatter(embeddings: Tensor, features: Tensor) -> Tensor:
        wide = mask[:, None].expand_as(embeddings)
        if accumulate:
            return embeddings + torch.zeros_like(embeddings).masked_scatter(wide, features)
        return embeddings.masked_scatter(wide, features)

    assert torch.equal(ours(*inputs), boolean_mask(*inputs))
    # Forward: every token is written and read once, from one of two places (both where added). Backward: the gradient
    # of the features is a copy, that of the embeddings too unless it is the incoming one itself.
    row = grad.nbytes // len(index)
    size = 2 * grad.nbytes + accumulate * features_count * row
    if step == "backward":
        size = 2 * features_count * row + (0 if accumulate else 2 * grad.nbytes - features_count * row)
    contest(
        timed(ours, inputs, grad, step),
        {
            "boolean mask": timed(boolean_mask, inputs, grad, step),
            "masked_scatter": timed(masked_scatter, inputs, grad, step),
        },
        bytes_moved=size,
        flops=index.numel(),
    )

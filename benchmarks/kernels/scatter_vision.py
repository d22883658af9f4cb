"""scatter_vision on the CPU, against the boolean-mask indexing that models use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from r4b_kernels import scatter_vision


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["replace", "deepstack_add"])
@pytest.mark.parametrize(("images", "run"), [(32, 64), (2048, 1)], ids=["runs_of_64", "runs_of_1"])
def test_scatter_vision(images: int, run: int, accumulate: bool, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    width, features_count = 256, images * run
    index = torch.full((4 * features_count,), -1)
    index.view(images, -1)[:, :run] = torch.arange(features_count).view(images, run)
    embeddings = torch.randn(len(index), width, requires_grad=True)
    features = torch.randn(features_count, width, requires_grad=True)
    grad = torch.randn(len(index), width)
    mask = index >= 0

    def done(out: torch.Tensor) -> object:
        return out if step == "forward" else torch.autograd.grad(out, (embeddings, features), grad)

    def ours() -> object:
        return done(scatter_vision(embeddings, features, index, accumulate=accumulate))

    def boolean_mask() -> object:
        out = embeddings.clone()
        out[mask] = out[mask] + features if accumulate else features
        return done(out)

    def masked_scatter() -> object:
        wide = mask[:, None].expand_as(embeddings)
        added = embeddings + torch.zeros_like(embeddings).masked_scatter(wide, features)
        return done(added if accumulate else embeddings.masked_scatter(wide, features))

    # Every token is written and read once from one of the two (both where added); the transpose moves the same.
    size = 2 * grad.nbytes + accumulate * features.nbytes
    if step == "forward_backward":
        size += (0 if accumulate else 2 * grad.nbytes) + 2 * features.nbytes
    contest(
        ours, {"boolean mask": boolean_mask, "masked_scatter": masked_scatter}, bytes_moved=size, flops=index.numel()
    )

"""merge_norm against what models write: a gather where patches lie in raster order, a LayerNorm, and a reshape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from benchmarks.kernels._step import STEPS, compiled, timed
from r4b_kernels import merge_norm

SIDE = on(32, 128)  # of the image, in patches
WIDTH = on(384, 1152)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ordered", [False, True], ids=["blocks", "raster"])
@pytest.mark.parametrize("norm_merged", [False, True], ids=["merger", "deepstack"])
def test_merge_norm(norm_merged: bool, ordered: bool, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    patches, span = SIDE * SIDE, 4 * WIDTH if norm_merged else WIDTH
    inputs = tuple(
        torch.randn(*shape, dtype=DTYPE, requires_grad=True) for shape in ((patches, WIDTH), (span,), (span,))
    )
    grad = torch.randn(patches // 4, 4 * WIDTH, dtype=DTYPE)
    blocks = torch.arange(patches).view(SIDE // 2, 2, SIDE // 2, 2).transpose(1, 2).flatten()
    order = blocks if ordered else None

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return merge_norm(x, weight, bias, norm_merged=norm_merged, order=order)

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = (x if order is None else x[order]).view(-1, span)
        return F.layer_norm(rows, (span,), weight, bias, 1e-6).view(grad.shape)

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if ON_GPU else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours(*inputs), composed(*inputs), **tolerance)
    rivals = {"torch composed": composed}
    if ON_GPU:
        rivals["torch.compile"] = compiled(composed)
    passes = 2 if step == "forward" else 3
    contest(
        timed(ours, inputs, grad, step),
        {name: timed(rival, inputs, grad, step) for name, rival in rivals.items()},
        bytes_moved=passes * grad.nbytes,
        flops=6 * passes * grad.numel(),
    )

"""vision_attention on the CPU: many small images, equal and unequal, and a few large ones at head dim 72."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import vision_attention

# lengths, heads, head dim
LOADS: dict[str, tuple[list[int], int, int]] = {
    "512_images_of_16": ([16] * 512, 4, 16),
    "256_images_of_16_to_100": ([random.Random(i).randint(16, 100) for i in range(256)], 4, 16),
    "2_images_of_1600_head_dim_72": ([1600, 1600], 4, 72),
}


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("load", LOADS)
def test_vision_attention(load: str, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    lengths, heads, dim = LOADS[load]
    patches = sum(lengths)
    leaves = [torch.randn(patches, heads, dim, requires_grad=True) for _ in range(3)]
    grad = torch.randn(patches, heads, dim)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in piece))[0] for piece in pieces], 1).mT.mT

    def jagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (torch.nested.nested_tensor_from_jagged(x, cu_seqlens.long()).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch).transpose(1, 2).values()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vision_attention(q, k, v, cu_seqlens)

    def timed(function: Callable[..., Tensor]) -> Callable[[], object]:
        if step == "forward":
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(
            function(*leaves), leaves, grad if function is not loop else grad.transpose(0, 1)
        )

    torch.testing.assert_close(ours(*leaves), loop(*leaves).transpose(0, 1), rtol=0, atol=1e-5)
    flops = 4 * dim * heads * sum(n * n for n in lengths)
    size = 4 * patches * heads * dim * 4
    if step == "forward_backward":
        flops += flops * 5 // 2
        size += 8 * patches * heads * dim * 4
    contest(
        timed(ours),
        {"SDPA per image": timed(loop), "SDPA nested jagged": timed(jagged)},
        bytes_moved=size,
        flops=flops,
    )

"""vision_attention: many small images, equal and unequal, and a few large ones (head dim 72: SigLIP, Qwen3-VL)."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from r4b_kernels import vision_attention

# lengths, heads, head dim
LOADS: dict[str, tuple[list[int], int, int]] = on(
    {
        "512_images_of_16": ([16] * 512, 4, 16),
        "256_images_of_16_to_100": ([random.Random(i).randint(16, 100) for i in range(256)], 4, 16),
        "2_images_of_1600_head_dim_72": ([1600, 1600], 4, 72),
    },
    {
        "256_images_of_64_to_400": ([random.Random(i).randint(64, 400) for i in range(256)], 16, 72),
        "128_images_of_256": ([256] * 128, 16, 72),
        "12_images_of_3600": ([3600] * 12, 16, 72),
        "1_image_of_35344": ([35344], 16, 72),
        "12_images_of_3600_head_dim_64": ([3600] * 12, 16, 64),
        "12_images_of_3600_head_dim_80": ([3600] * 12, 16, 80),
    },
)


def flash_attention_4(cu_seqlens: Tensor) -> Callable[..., Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=False)
        return out[0] if isinstance(out, tuple) else out

    return run


def flex_attention(lengths: list[int]) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    blocks = create_block_mask(
        lambda _b, _h, row, column: image[row] == image[column], None, None, len(image), len(image)
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(x[None].transpose(1, 2) for x in (q, k, v)), block_mask=blocks)[0].transpose(0, 1)

    return run


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("load", LOADS)
def test_vision_attention(load: str, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    lengths, heads, dim = LOADS[load]
    patches = sum(lengths)
    leaves = [torch.randn(patches, heads, dim, dtype=DTYPE, requires_grad=True) for _ in range(3)]
    grad = torch.randn(patches, heads, dim, dtype=DTYPE)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in piece))[0] for piece in pieces]
        return torch.cat(outs, 1).transpose(0, 1)

    def jagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (torch.nested.nested_tensor_from_jagged(x, cu_seqlens.long()).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch).transpose(1, 2).values()

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vision_attention(q, k, v, cu_seqlens)

    def timed(function: Callable[..., Tensor]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(lambda: function(*leaves))
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    torch.testing.assert_close(ours(*leaves), loop(*leaves), rtol=0, atol=on(1e-5, 3e-2))
    rivals = {"SDPA per image": timed(loop), "SDPA nested jagged": timed(jagged)}
    skipped = {}
    if ON_GPU:
        compiled: list[Callable[..., Tensor]] = []

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not compiled:
                compiled.append(flex_attention(lengths))
            return compiled[0](q, k, v)

        rivals |= {"torch varlen_attn": timed(varlen), "FlexAttention": timed(flex)}
        if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
            rivals["FlashAttention-4"] = timed(flash_attention_4(cu_seqlens))
        else:
            skipped["FlashAttention-4"] = "not installed"
    flops = 4 * dim * heads * sum(n * n for n in lengths)
    size = 4 * patches * heads * dim * leaves[0].element_size()
    if step == "forward_backward":
        flops += flops * 5 // 2
        size *= 3
    contest(timed(ours), rivals, bytes_moved=size, flops=flops, skipped=skipped)

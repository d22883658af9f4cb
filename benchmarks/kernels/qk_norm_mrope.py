"""qk_norm_mrope against transformers' Qwen3 norm and rotation, to which cos and sin are given for free."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from benchmarks.kernels._step import STEPS, compiled
from r4b_kernels import qk_norm_mrope

# tokens, query heads, key heads, head dim
SHAPES = on([(8192, 4, 2, 32), (2048, 16, 8, 128)], [(16384, 32, 8, 128), (65536, 32, 8, 128)])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_qk_norm_mrope(shape: tuple[int, int, int, int], step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    tokens, hq, hk, dim = shape
    half = dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    leaves = [
        torch.randn(*size, dtype=DTYPE, requires_grad=True)
        for size in ((tokens, hq, dim), (tokens, hk, dim), (dim,), (dim,))
    ]
    grads = [torch.randn_like(x) for x in leaves[:2]]
    position_ids = (torch.arange(tokens) % 997).expand(3, -1)
    cos, sin = torch.randn(2, tokens, 1, dim, dtype=DTYPE)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        exact = x.float()
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def two_steps(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return turned(normed(q, q_weight)), turned(normed(k, k_weight))

    def ours(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_mrope(q, k, q_weight, k_weight, position_ids, theta=1e6, sections=sections, interleaved=True)

    def timed(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(lambda: function(*leaves))
        outs = function(*leaves)
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    rivals, skipped = {"transformers Qwen3": timed(two_steps)}, {}
    if ON_GPU:
        rivals["torch.compile"] = timed(compiled(two_steps))
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction
            from liger_kernel.ops.rope import LigerRopeFunction

            tables = cos[None, :, 0], sin[None, :, 0]

            def liger(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
                pairs = ((q, q_weight), (k, k_weight))
                heads = (LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)[None].mT for x, w in pairs)
                return LigerRopeFunction.apply(*(x.mT.transpose(1, 2) for x in heads), *tables)

            if step == "forward":
                rivals["Liger, two kernels"] = timed(liger)
            else:
                skipped["Liger, two kernels"] = "writes its gradients in place: it cannot be repeated"
        else:
            skipped["Liger"] = "liger-kernel is not installed"
    # Forward reads and writes q and k once; backward reads them and their gradients, and writes gradients.
    passes, work = (2, 10) if step == "forward" else (3, 22)
    elements = sum(x.numel() for x in leaves[:2])
    contest(
        timed(ours),
        rivals,
        bytes_moved=passes * elements * leaves[0].itemsize + position_ids[0].nbytes * 3,
        flops=work * elements,
        skipped=skipped,
    )

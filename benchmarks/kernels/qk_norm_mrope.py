"""qk_norm_mrope on the CPU, against transformers' Qwen3 norm and rotation with cos and sin given to it for free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from r4b_kernels import qk_norm_mrope


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize(("tokens", "hq", "hk", "dim"), [(8192, 4, 2, 32), (2048, 16, 8, 128)])
def test_qk_norm_mrope(tokens: int, hq: int, hk: int, dim: int, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    half = dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    q, k = (torch.randn(tokens, heads, dim, requires_grad=True) for heads in (hq, hk))
    q_norm, k_norm = Qwen3RMSNorm(dim), Qwen3RMSNorm(dim)
    leaves = [q, k, q_norm.weight, k_norm.weight]
    position_ids = torch.arange(tokens).expand(3, -1) % 997
    cos, sin = torch.randn(2, 1, tokens, dim)
    grads = [torch.randn_like(q), torch.randn_like(k)]

    def ours() -> object:
        out = qk_norm_mrope(*leaves, position_ids, theta=1e6, sections=sections, interleaved=True)
        return out if step == "forward" else torch.autograd.grad(out, leaves, grads)

    def transformers() -> object:
        normed = (norm(x)[None].transpose(1, 2) for norm, x in ((q_norm, q), (k_norm, k)))
        out = apply_rotary_pos_emb(*normed, cos, sin)
        if step == "forward":
            return out
        return torch.autograd.grad(out, leaves, [x[None].transpose(1, 2) for x in grads])

    # Forward reads and writes q and k once; backward reads them and their gradients and writes gradients.
    elements = tokens * (hq + hk) * dim
    passes, work = (2, 10) if step == "forward" else (5, 32)
    contest(ours, {"transformers Qwen3": transformers}, bytes_moved=passes * elements * 4, flops=work * elements)

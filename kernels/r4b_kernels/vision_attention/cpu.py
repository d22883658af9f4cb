"""vision_attention on the CPU: images of similar size share a flash call, large ones run in place."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from r4b_kernels import _varlen_cpu as varlen


class Backend:
    """Forward and backward as the custom op wants them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        plan = _plan_for(cu_seqlens, q.shape[0])
        dtype = q.dtype
        q, k, v = varlen.operands(q, k, v)
        out, lse = varlen.forward(q, k, v, plan, False, scale)
        return out.to(dtype), lse

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = _plan_for(cu_seqlens, q.shape[0])
        dtype = q.dtype
        grad_out, q, k, v, out = varlen.operands(grad_out, q, k, v, out)
        grad_q, grad_k, grad_v = varlen.backward(grad_out, q, k, v, out, lse, plan, False, scale)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _plan_for(cu_seqlens: Tensor, num_patches: int) -> varlen.Plan:
    plan = _make_plan(cu_seqlens.numpy().tobytes())
    if plan.total > num_patches:
        raise ValueError(f"cu_seqlens covers {plan.total} patches but q has {num_patches}")
    return plan


@lru_cache(maxsize=32)
def _make_plan(cu_seqlens_bytes: bytes) -> varlen.Plan:
    bounds = np.frombuffer(cu_seqlens_bytes, dtype=np.int32).tolist()
    if bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("cu_seqlens must start at 0 and never decrease")
    return varlen.make_plan(bounds, causal=False)

"""vision_attention on the CPU: images of similar size share a flash call, large ones run in place."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from r4b_kernels import _varlen_cpu as varlen


class Backend:
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        total, plan = _plan_for(cu_seqlens, q.shape[0])
        dtype, dtype_out = varlen.working_dtype(q.dtype), q.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=dtype)
        lse = torch.empty(q.shape[:2], dtype=dtype)
        out[total:] = 0
        lse[total:] = float("-inf")
        varlen.forward(q, k, v, plan, False, scale, out, lse)
        return out.to(dtype_out), lse

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, plan = _plan_for(cu_seqlens, q.shape[0])
        dtype, dtype_out = varlen.working_dtype(q.dtype), q.dtype
        grad_out, q, k, v, out = (x.to(dtype) for x in (grad_out, q, k, v, out))
        grads = tuple(torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
        for grad in grads:
            grad[total:] = 0
        varlen.backward(grad_out, q, k, v, out, lse, plan, False, scale, grads)
        return tuple(grad.to(dtype_out) for grad in grads)


def _plan_for(cu_seqlens: Tensor, num_patches: int) -> tuple[int, varlen.Plan]:
    total, plan = _make_plan(cu_seqlens.numpy().tobytes())
    if total > num_patches:
        raise ValueError(f"cu_seqlens covers {total} patches but q has {num_patches}")
    return total, plan


@lru_cache(maxsize=32)
def _make_plan(cu_seqlens_bytes: bytes) -> tuple[int, varlen.Plan]:
    bounds = np.frombuffer(cu_seqlens_bytes, dtype=np.int32).tolist()
    if bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("cu_seqlens must start at 0 and never decrease")
    return bounds[-1], varlen.make_plan(list(zip(bounds, bounds[1:], strict=False)), causal=False)

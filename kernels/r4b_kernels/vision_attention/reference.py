"""The definition of vision_attention: one dense softmax per image, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def vision_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [P, H, D] in q.dtype, lse [P, H]); differentiable by autograd."""
    dtype = accumulation_dtype(q.dtype)
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    bounds = cu_seqlens.tolist()
    outs, lses = [], []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", queries[start:stop], keys[start:stop]) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values[start:stop]))
        lses.append(scores.logsumexp(dim=-1).T)
    tail = q.shape[0] - bounds[-1]
    outs.append(queries.new_zeros(tail, *q.shape[1:]))
    lses.append(queries.new_full((tail, q.shape[1]), float("-inf")))
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


class Backend:
    """Forward and backward as the custom op wants them: the backward is autograd's of the forward above."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return vision_attention(q, k, v, cu_seqlens, scale)

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # func.vjp, because autograd proper does not record inside a custom op.
        vjp = torch.func.vjp(lambda *x: vision_attention(x[0], x[1], x[2], cu_seqlens, scale)[0], q, k, v)[1]
        return vjp(grad_out)

"""The definition of prefix_attention: one dense softmax per segment, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D] in q.dtype, lse [T, Hq]); differentiable by autograd."""
    dtype = accumulation_dtype(q.dtype)
    repeat = q.shape[1] // k.shape[1]
    queries = q.to(dtype)
    keys, values = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (k, v))
    bounds, parents = offsets.tolist(), parent.tolist()

    outs, lses = [], []
    for segment, owner in enumerate(parents):
        start, stop = bounds[segment], bounds[segment + 1]
        first, last = (bounds[owner], bounds[owner + 1]) if owner >= 0 else (start, start)
        own = torch.arange(start, stop, device=q.device)
        seen = torch.cat([torch.arange(first, last, device=q.device), own])
        scores = torch.einsum("qhd,khd->hqk", queries[own], keys[seen]) * scale
        # Parent positions come before every own position, so "not after me" is the whole mask.
        scores = scores.masked_fill(seen[None, :] > own[:, None], float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values[seen]))
        lses.append(scores.logsumexp(dim=-1).T)

    tail = q.shape[0] - bounds[-1]
    outs.append(queries.new_zeros(tail, *q.shape[1:]))
    lses.append(queries.new_full((tail, q.shape[1]), float("-inf")))
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


class Backend:
    """Forward and backward as the custom op wants them: the backward is autograd's of the forward above."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return prefix_attention(q, k, v, offsets, parent, scale)

    @staticmethod
    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Tensor,
        parent: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # func.vjp, because autograd proper does not record inside a custom op.
        vjp = torch.func.vjp(lambda *x: prefix_attention(x[0], x[1], x[2], offsets, parent, scale)[0], q, k, v)[1]
        return vjp(grad_out)

"""The definition of prefix_attention: one dense softmax per segment, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D] in q.dtype, lse [T, Hq]); differentiable by autograd."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
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
    def forward(q, k, v, offsets, parent, scale):
        return prefix_attention(q, k, v, offsets, parent, scale)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, offsets, parent, scale):
        # func.vjp, because autograd proper does not record inside a custom op.
        _, vjp = torch.func.vjp(lambda *inputs: prefix_attention(*inputs, offsets, parent, scale)[0], q, k, v)
        return vjp(grad_out)

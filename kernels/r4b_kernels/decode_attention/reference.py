"""The definition of decode_attention, row by row, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def decode_attention(
    mixed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    column: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_lengths: Tensor,
    offsets: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """[N, Hk * s * D], and the new keys and values in the caches."""
    rows, heads, each, dim = mixed.shape
    dtype, last = accumulation_dtype(mixed.dtype), own_values.shape[2] - 1
    prompt = torch.arange(len(prompt_lengths), device=mixed.device).repeat_interleave(offsets.diff())
    out = mixed.new_empty(rows, heads, each - 2, dim)
    for n in range(rows):
        x = mixed[n].to(dtype)
        same, rolled = rope[:, n].to(dtype)

        def norm_and_turn(head: Tensor, weight: Tensor, same: Tensor = same, rolled: Tensor = rolled) -> Tensor:
            normed = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
            return normed * same + normed.roll(dim // 2, -1) * rolled

        place, seen = min(max(int(column[n]), 0), last), min(int(column[n]), last) + 1
        own_keys[:, n, :, place] = norm_and_turn(x[:, -2], k_weight).to(own_keys.dtype)
        own_values[:, n, place] = mixed[n, :, -1]
        g = int(prompt[n])
        length = int(prompt_lengths[g])
        keys = torch.cat([prompt_keys[:, g, :, :length], own_keys[:, n, :, :seen]], 2).to(dtype)
        values = torch.cat([prompt_values[:, g, :length], own_values[:, n, :seen]], 1).to(dtype)
        scores = torch.bmm(norm_and_turn(x[:, :-2], q_weight), keys) * scale
        # Over no key at all this is 0 / 0.
        weights = (scores - scores.amax(-1, keepdim=True)).exp() if scores.numel() else scores
        out[n] = (torch.bmm(weights, values) / weights.sum(-1, keepdim=True)).to(out.dtype)
    return out.flatten(1)


class Backend:
    """The reference backend."""

    forward = staticmethod(decode_attention)

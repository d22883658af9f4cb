"""decode_attention in torch's calls on any device, none of which waits for it: sizes come from shapes alone.

Every row asks a copy of its prompt's keys and values, as how many rows a prompt has is known to the device only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.decode_attention import cpu


class Backend:
    """The torch backend."""

    @staticmethod
    def forward(
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
        rows, heads, each, dim = mixed.shape
        share, longest, columns = each - 2, prompt_values.shape[2], own_values.shape[2]
        if not rows:
            return mixed.new_empty(0, heads * share * dim)
        query = cpu.append(mixed, q_weight, k_weight, rope, column, own_keys, own_values, eps, scale)
        row = torch.arange(rows, device=mixed.device)
        # Of prompts without rows, which begin where the next does, the last is a row's own.
        prompt = torch.searchsorted(offsets, row, right=True).sub_(1).clamp_(0, len(prompt_lengths) - 1)
        prompt_keys, prompt_values = (x.index_select(1, prompt).flatten(0, 1) for x in (prompt_keys, prompt_values))
        own_keys, own_values = own_keys.flatten(0, 1), own_values.flatten(0, 1)
        scores = torch.cat([torch.bmm(query, prompt_keys), torch.bmm(query, own_keys)], 2)
        cpu.mask(scores.view(heads, rows, share, -1), prompt_lengths[prompt], longest, column, columns)
        probs = scores.softmax(2)
        out = torch.bmm(probs[..., :longest], prompt_values)
        out = torch.baddbmm(out, probs[..., longest:], own_values)
        return out.view(heads, rows, -1).transpose(0, 1).reshape(rows, -1)

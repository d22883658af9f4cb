"""The definition of draw_tokens, row by row, in float32 (float64 for float64 logits)."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def draw_tokens(
    logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64 [N], logprob [N], entropy [N])."""
    rows, count = logits.shape
    exact = logits.to(accumulation_dtype(logits.dtype)) / (temperature or 1.0)
    logprobs = exact - exact.logsumexp(-1, keepdim=True)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    token = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    for n in range(rows):
        probs = logprobs[n].exp().double()
        if forced is not None and forced[n] >= 0:
            token[n] = forced[n]
        elif temperature == 0:
            token[n] = probs.argmax()
        else:
            if top_p < 1:
                ordered, index = probs.sort(dim=0, descending=True, stable=True)
                before = ordered.cumsum(0) - ordered
                probs = torch.zeros_like(probs).index_copy(0, index, ordered * (before < top_p))
            cdf = probs.cumsum(0)
            token[n] = min(int((cdf <= point[n] * cdf[-1]).sum()), count - 1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1), entropy


class Backend:
    """The reference backend."""

    forward = staticmethod(draw_tokens)

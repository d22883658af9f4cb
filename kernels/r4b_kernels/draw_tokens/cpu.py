"""draw_tokens in torch's calls on whole rows, on any device; none of them waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


class Backend:
    """The cpu backend, and the torch one."""

    @staticmethod
    def forward(
        logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.to(accumulation_dtype(logits.dtype))
        logprobs = torch.log_softmax(logits / temperature if temperature not in (0.0, 1.0) else logits, dim=-1)
        probs = logprobs.exp()
        entropy = torch.special.entr(probs).sum(-1)
        if temperature == 0:
            token = logprobs.argmax(-1)
        else:
            token = _invert_cdf(probs if top_p >= 1 else _nucleus(probs, top_p), point)
        if forced is not None:
            token = torch.where(forced >= 0, forced, token)
        return token, logprobs.gather(1, token[:, None]).squeeze(1), entropy


def _invert_cdf(probs: Tensor, point: Tensor) -> Tensor:
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # A point below 1 times the total stays below the total, so the token is always one with a probability.
    token = torch.searchsorted(cdf, (point * cdf[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp_(max=probs.shape[1] - 1)  # logits that are not numbers


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero every token outside the smallest set whose probability reaches ``top_p``."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probs).scatter_(-1, index, ordered.masked_fill(outside, 0.0))

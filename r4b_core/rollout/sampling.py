"""Drawing tokens so that a request's randomness depends on nothing but its own seed.

Shapes: N requests, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def request_seed(*parts: int) -> int:
    """A 63-bit seed from (run seed, step, prompt, rollout, ...): stable, and different for every combination."""
    state = 0
    for part in parts:
        state = _splitmix64((state ^ part) & _MASK)
    return state >> 1


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 in [0, 1): a hash of (seed, position), int64 of any shapes that broadcast; the same on every machine."""
    x = seed + position * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Draw:
    """token int64 [N]; logprob and entropy float32 [N] of the full distribution."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor


def draw(logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float) -> Draw:
    """Draw the next token of every request by inverting the CDF at its point.

    Args:
        logits: float [N, V].
        point: float64 [N] in [0, 1), see `uniform`.
        forced: int64 [N], a token to take whatever its probability, or -1; None forces none.
        temperature: 0 takes the most probable token; log-probs are then those at temperature 1.
        top_p: nucleus; log-probs stay those of the full distribution.
    """
    logits = logits.float()
    logprobs = torch.log_softmax(logits / temperature if temperature not in (0.0, 1.0) else logits, dim=-1)
    probs = logprobs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        token = _invert_cdf(probs if top_p >= 1 else _nucleus(probs, top_p), point)
    if forced is not None:
        token = torch.where(forced >= 0, forced, token)
    return Draw(token, logprobs.gather(1, token[:, None]).squeeze(1), entropy)


def _invert_cdf(probs: Tensor, point: Tensor) -> Tensor:
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # A point below 1 times the total stays below the total, so the token is always one with a probability.
    return torch.searchsorted(cdf, (point * cdf[:, -1])[:, None], right=True).squeeze(1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero every token outside the smallest set whose probability reaches ``top_p``."""
    ordered, index = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probs).scatter_(-1, index, ordered.masked_fill(outside, 0.0))

"""Drawing tokens so that a request's randomness depends on nothing but its own seed.

Shapes: N requests, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from r4b_kernels import dispatch

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


class Draw(NamedTuple):
    """token int64 [N]; logprob and entropy float32 [N] of the full distribution."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor


def draw(logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float) -> Draw:
    """`r4b_kernels.draw_tokens` without its checks, for which a step has no time.

    Args:
        logits: float32 [N, V], contiguous as the others are.
        point: float64 [N] in [0, 1), see `uniform`.
        forced: int64 [N], a token to take whatever its probability, or -1; None forces none.
        temperature: 0 takes the most probable token; log-probs are then those at temperature 1.
        top_p: nucleus; log-probs stay those of the full distribution.
    """
    backend = dispatch.resolve("draw_tokens", logits.device, None, logits)
    return Draw(*backend.forward(logits, point, forced, temperature, top_p))

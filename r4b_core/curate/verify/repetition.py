"""Does a text say the same thing again and again? (MMFineReason 3.3: a 50-gram of words that occurs three times.)"""

from __future__ import annotations

from collections import Counter

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


def repeated_reference(words: list[str], n: int, times: int) -> tuple[str, ...] | None:
    """The first ``n``-gram that occurs at least ``times`` times, overlaps counted: by counting all of them."""
    counts = Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
    return next((gram for gram, count in counts.items() if count >= times), None)


def repeated(words: list[str], n: int = 50, times: int = 3) -> tuple[str, ...] | None:
    """As `repeated_reference`, in time linear in the number of words (but for a sort).

    A rolling hash (a polynomial modulo 2^64 over the words' hashes) finds candidates; only their words are compared.
    """
    grams = len(words) - n + 1
    if grams < times:
        return None
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    sums = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(hashes * _powers(_BASE, len(words)), out=sums[1:])
    rolling = (sums[n:] - sums[:-n]) * _powers(_INVERSE, grams)
    order = np.sort(rolling)
    candidates = order[times - 1 :][order[times - 1 :] == order[: grams - times + 1]]
    if not len(candidates):
        return None
    positions = np.flatnonzero(np.isin(rolling, candidates))
    counts = Counter(tuple(words[k : k + n]) for k in positions.tolist())
    return next((gram for gram, count in counts.items() if count >= times), None)


_cached: dict[int, np.ndarray] = {}


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64."""
    powers = _cached.get(base)
    if powers is None or len(powers) < count:
        size = max(8192, 1 << (count - 1).bit_length())
        steps = np.full(size, base, np.uint64)
        steps[0] = 1
        powers = _cached[base] = np.cumprod(steps)
    return powers[:count]

"""pack_groups: time, fill and evenness for groups of 8 thinking and 8 direct responses, and for plain sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from r4b_kernels import pack_groups


def draw(count: int, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """Log-normal lengths: prompts of median 1200, thinking responses of 1500, direct ones of 120."""
    rng = np.random.default_rng(seed)

    def lengths(median: float, spread: float, size: int, high: int) -> list[int]:
        return np.exp(rng.normal(np.log(median), spread, size)).astype(int).clip(8, high).tolist()

    prefixes = lengths(1200, 0.6, count, 6000)
    return prefixes, [lengths(1500, 0.7, 8, 8192) + lengths(120, 0.5, 8, 2000) for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("capacity", [16384, 32768, 65536])
@pytest.mark.parametrize("groups", [64, 256])
def test_shared_groups(groups: int, capacity: int, ranks: int, benchmark: Any, contest: Callable[..., None]) -> None:
    prefixes, responses = draw(groups)
    plan = pack_groups(prefixes, responses, capacity, ranks=ranks)
    plain = pack_groups(prefixes, responses, capacity, ranks=ranks, backend="reference")
    benchmark.extra_info.update(
        fill=plan.fill, imbalance=plan.imbalance, bins=len(plan.bins), first_fit_fill=plain.fill
    )
    contest(
        lambda: pack_groups(prefixes, responses, capacity, ranks=ranks),
        {
            "first fit": lambda: pack_groups(prefixes, responses, capacity, ranks=ranks, backend="reference"),
            "in Python": lambda: pack_groups(prefixes, responses, capacity, ranks=ranks, backend="cpu"),
        },
        bytes_moved=8 * 17 * groups,
        flops=0,
    )


@pytest.mark.parametrize("share_prefix", [True, False], ids=["plain_sequences", "prompts_repeated"])
def test_1024_sequences(share_prefix: bool, benchmark: Any, contest: Callable[..., None]) -> None:
    prefixes, responses = draw(64)
    if share_prefix:
        responses = [[length] for group in responses for length in group]
        prefixes = [0] * len(responses)
    plan = pack_groups(prefixes, responses, 16384, ranks=8, share_prefix=share_prefix)
    benchmark.extra_info.update(fill=plan.fill, imbalance=plan.imbalance, bins=len(plan.bins))
    contest(
        lambda: pack_groups(prefixes, responses, 16384, ranks=8, share_prefix=share_prefix),
        {
            "in Python": lambda: pack_groups(
                prefixes, responses, 16384, ranks=8, share_prefix=share_prefix, backend="cpu"
            )
        },
        bytes_moved=8 * 1024,
        flops=0,
    )

"""The nouns of packing: the problem, its cost model and the plan that solves it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Bin = list[tuple[int, list[int]]]
"""What one bin holds: (group index, indices of the responses of it that are here), groups in ascending order."""


class PackCost(NamedTuple):
    """Cost of a bin: ``token`` per token + ``pair`` per (query, key) pair that attends + the vision cost of its groups.

    The default pair weight is that of an 8B decoder (hidden 4096, 36 layers, 32 heads of 128, 6.9e9 weights in its
    matrices): 4 * 128 * 32 * 36 FLOPs per pair against 2 * 6.9e9 per token.
    """

    token: float = 1.0
    pair: float = 4 * 128 * 32 * 36 / (2 * 6.9e9)


@dataclass(frozen=True)
class Problem:
    """Checked arguments of pack_groups."""

    prefixes: list[int]
    responses: list[list[int]]
    capacity: int
    ranks: int
    share_prefix: bool
    vision: list[float]
    cost: PackCost
    split: bool

    @cached_property
    def unique_tokens(self) -> int:
        """Tokens that exist once: each prefix once per group that shares it, else once per response."""
        return sum(
            sum(lengths) + prefix * ((1 if self.share_prefix else len(lengths)) if lengths else 0)
            for prefix, lengths in zip(self.prefixes, self.responses, strict=True)
        )

    def tokens(self, group: int, members: list[int]) -> int:
        """Tokens these responses of a group take in one bin, with their prefix."""
        copies = (1 if self.share_prefix else len(members)) if members else 0
        return copies * self.prefixes[group] + sum(self.responses[group][m] for m in members)

    def cost_of(self, bin_: Bin) -> float:
        """Causal attention within the prefix and within each response, every response token over its whole prefix."""
        total = 0.0
        for group, members in bin_:
            prefix, lengths = self.prefixes[group], self.responses[group]
            copies = 1 if self.share_prefix else len(members)
            tokens, pairs = copies * prefix, copies * (prefix * (prefix + 1) // 2)
            for member in members:
                length = lengths[member]
                tokens += length
                pairs += length * (length + 1) // 2 + length * prefix
            total += self.cost.token * tokens + self.cost.pair * pairs + copies * self.vision[group]
        return total


@dataclass(frozen=True)
class PackPlan:
    """Bins and where they go.

    Attributes:
        bins: the bins, the empty ones included; a multiple of the number of ranks.
        rank_of_bin: the rank of each bin.
        bin_tokens: tokens of each bin, prefixes included as often as they are charged.
        bin_costs: cost of each bin.
        capacity: tokens per bin.
        num_ranks: data-parallel ranks.
        unique_tokens: tokens that exist once (each prefix once per group with a shared prefix, else per response).
    """

    bins: list[Bin]
    rank_of_bin: list[int]
    bin_tokens: list[int]
    bin_costs: list[float]
    capacity: int
    num_ranks: int
    unique_tokens: int

    @cached_property
    def ranks(self) -> list[list[Bin]]:
        """The bins of each rank."""
        shares: list[list[Bin]] = [[] for _ in range(self.num_ranks)]
        for bin_, rank in zip(self.bins, self.rank_of_bin, strict=True):
            shares[rank].append(bin_)
        return shares

    @cached_property
    def rank_costs(self) -> list[float]:
        costs = [0.0] * self.num_ranks
        for cost, rank in zip(self.bin_costs, self.rank_of_bin, strict=True):
            costs[rank] += cost
        return costs

    @property
    def fill(self) -> float:
        """Effective fill: tokens that exist once / (bins * capacity). Prefixes paid again lower it. 1.0 if no bins."""
        return self.unique_tokens / (len(self.bins) * self.capacity) if self.bins else 1.0

    @property
    def imbalance(self) -> float:
        """Largest rank cost / mean rank cost; 1.0 is even."""
        total = 0.0
        for cost in self.rank_costs:  # not sum(), whose rounding is another from Python 3.12 on
            total += cost
        mean = total / self.num_ranks
        return max(self.rank_costs) / mean if mean > 0 else 1.0


def finish(problem: Problem, bins: list[Bin], rank_of_bin: list[int], bin_costs: list[float]) -> PackPlan:
    """A plan from bins that are already dealt out."""
    return PackPlan(
        bins=bins,
        rank_of_bin=rank_of_bin,
        bin_tokens=[sum(problem.tokens(group, members) for group, members in bin_) for bin_ in bins],
        bin_costs=bin_costs,
        capacity=problem.capacity,
        num_ranks=problem.ranks,
        unique_tokens=problem.unique_tokens,
    )

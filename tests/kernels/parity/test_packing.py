"""pack_groups against verl's balancing over ranks, by the cost that both can count: 24576 n + n^2 for n tokens.

verl balances whole lists over ranks and cuts each rank's into micro-batches afterwards; pack_groups fills bins of one
capacity first and moves bins. So single sequences come out a little less even here, and groups more even: verl keeps
them whole, in equal numbers, and weighs each response with a prompt of its own.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence

import pytest

from r4b_kernels import PackCost, PackPlan, pack_groups

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is an oracle, not a dependency", allow_module_level=True)

from tests.kernels.adapters.verl_oracle import seqlen_balancing

RANKS, CAPACITY = 8, 16384
# n tokens have n (n + 1) / 2 pairs, so this is verl's 24576 n + n^2.
VERL = PackCost(token=24575.0, pair=2.0)


def lengths(generator: random.Random, count: int, median: float, spread: float, most: int) -> list[int]:
    return [int(min(most, max(20, median * generator.lognormvariate(0, spread)))) for _ in range(count)]


def rank_costs(plan: PackPlan) -> list[float]:
    costs = [0.0] * plan.num_ranks
    for rank, cost in zip(plan.rank_of_bin, plan.bin_costs, strict=True):
        costs[rank] += cost
    return costs


def imbalance(costs: Sequence[float]) -> float:
    return max(costs) / (sum(costs) / len(costs))


def test_the_costs_are_the_same() -> None:
    import torch

    sizes = [1, 17, 4096]
    plan = pack_groups([0] * 3, [[size] for size in sizes], 4096, ranks=3, cost=VERL)
    theirs = seqlen_balancing.calculate_workload(torch.tensor(sizes)).tolist()
    assert sum(plan.bin_costs) == sum(theirs)


@pytest.mark.parametrize("seed", range(4))
def test_sequences(seed: int) -> None:
    sizes = lengths(random.Random(seed), 256, 1100, 0.9, 8000)
    plan = pack_groups([0] * len(sizes), [[size] for size in sizes], CAPACITY, ranks=RANKS, cost=VERL)
    work = [24576 * size + size**2 for size in sizes]
    partitions = seqlen_balancing.get_seqlen_balanced_partitions(work, RANKS, equal_size=False)
    theirs = imbalance([sum(work[i] for i in part) for part in partitions])
    assert imbalance(rank_costs(plan)) <= theirs + 0.005


def shared_cost(
    indices: Sequence[int], group_of: Sequence[int], prefixes: Sequence[int], total: Sequence[int]
) -> float:
    """What a rank pays for these responses if each prompt is computed once: the cost of PackCost, counted here."""
    cost = 0.0
    for group in {group_of[i] for i in indices}:
        prefix = prefixes[group]
        cost += 24575 * prefix + prefix * (prefix + 1)
        for size in (total[i] - prefix for i in indices if group_of[i] == group):
            cost += 24575 * size + size * (size + 1) + 2 * size * prefix
    return cost


@pytest.mark.parametrize("seed", range(6))
def test_groups_that_share_their_prompt(seed: int) -> None:
    """32 prompts with four long and four short responses: the busiest rank, which the step waits for, does less."""
    generator = random.Random(seed)
    prefixes = lengths(generator, 32, 1200, 0.6, 6000)
    responses = [
        lengths(generator, 4, 1500, 0.7, 6000) + lengths(generator, 4, 120, 0.7, 2000) for _ in range(len(prefixes))
    ]
    plan = pack_groups(prefixes, responses, CAPACITY, ranks=RANKS, cost=VERL)
    group_of = [group for group, sizes in enumerate(responses) for _ in sizes]
    total = [prefixes[group] + size for group, sizes in enumerate(responses) for size in sizes]
    partitions = seqlen_balancing.get_group_balanced_partitions(total, group_of, RANKS)
    theirs = [shared_cost(part, group_of, prefixes, total) for part in partitions]
    ours = rank_costs(plan)
    assert sum(ours) >= sum(theirs)  # a group in two bins pays its prompt twice; verl has none of that
    assert imbalance(ours) <= imbalance(theirs)
    assert max(ours) <= max(theirs)

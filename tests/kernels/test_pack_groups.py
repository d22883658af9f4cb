"""pack_groups: the rules of the plan as properties over random problems, and how full the bins get."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from r4b_kernels import PackCost, PackPlan, build, dispatch, pack_groups

needs_compiler = pytest.mark.skipif(build.why_not("cpu") is not None, reason="no compiler to build with")
BACKENDS = [pytest.param("native", marks=needs_compiler), "cpu", "reference"]


def problem(seed: int) -> tuple[list[int], list[list[int]], int, dict]:
    """Random in everything: empty groups, responses of no tokens, prefixes of 0, capacities from tight to roomy."""
    rng = random.Random(seed)
    groups = rng.randint(0, 25)
    longest = rng.choice([3, 40, 400])
    prefixes = [rng.choice([0, rng.randint(0, longest)]) for _ in range(groups)]
    responses = [[rng.randint(0, longest) for _ in range(rng.choice([0, 1, 1, 4, 9]))] for _ in range(groups)]
    share, split = rng.random() < 0.6, rng.random() < 0.8
    need = 1
    for prefix, lengths in zip(prefixes, responses, strict=True):
        if lengths:
            copies = 1 if share else len(lengths)
            need = max(need, prefix + max(lengths) if split else copies * prefix + sum(lengths))
    options = {"ranks": rng.choice([1, 2, 3, 8]), "share_prefix": share, "split": split}
    return prefixes, responses, need + rng.choice([0, longest, 5 * longest]), options


def charged(prefixes: list[int], responses: list[list[int]], share: bool, bin_: list) -> int:
    total = 0
    for group, members in bin_:
        total += prefixes[group] * (1 if share else len(members)) + sum(responses[group][m] for m in members)
    return total


def check(plan: PackPlan, prefixes: list[int], responses: list[list[int]], capacity: int, options: dict) -> None:
    placed = [(group, member) for bin_ in plan.bins for group, members in bin_ for member in members]
    assert sorted(placed) == [(g, m) for g, lengths in enumerate(responses) for m in range(len(lengths))]
    tokens = [charged(prefixes, responses, options["share_prefix"], bin_) for bin_ in plan.bins]
    assert tokens == plan.bin_tokens and max(tokens, default=0) <= capacity
    homes: dict[int, int] = {}
    for bin_ in plan.bins:
        names = [group for group, _ in bin_]
        assert names == sorted(set(names)) and all(members == sorted(members) and members for _, members in bin_)
        for group in names:
            homes[group] = homes.get(group, 0) + 1
    if not options["split"]:
        assert max(homes.values(), default=1) == 1
    ranks = options["ranks"]
    assert len(plan.ranks) == ranks and len({len(share) for share in plan.ranks}) == 1
    assert sorted(map(id, plan.bins)) == sorted(id(bin_) for share in plan.ranks for bin_ in share)
    unique = charged(
        prefixes, responses, options["share_prefix"], [(g, range(len(r))) for g, r in enumerate(responses) if r]
    )
    assert plan.unique_tokens == unique and plan.fill <= 1.0
    assert plan.imbalance >= 1.0 - 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_hold_on_random_problems(backend: str) -> None:
    for seed in range(200):
        prefixes, responses, capacity, options = problem(seed)
        plan = pack_groups(prefixes, responses, capacity, backend=backend, **options)
        check(plan, prefixes, responses, capacity, options)
        assert plan == pack_groups(prefixes, responses, capacity, backend=backend, **options)


@needs_compiler
def test_native_gives_the_plan_of_the_cpu_backend() -> None:
    """Bit for bit: bins, ranks, and the costs that decided."""
    for seed in range(300):
        prefixes, responses, capacity, options = problem(seed)
        rng = random.Random(seed)
        options["vision_cost"] = [rng.choice([0.0, rng.uniform(0, 900)]) for _ in prefixes]
        options["cost"] = rng.choice([None, PackCost(1.3, 0.01), PackCost(0, 1)])
        plans = [pack_groups(prefixes, responses, capacity, backend=name, **options) for name in ("cpu", "native")]
        assert plans[0] == plans[1], seed
    for share in (True, False):
        arguments = (*synthetic(64, 2), 32768)
        plans = [
            pack_groups(
                *arguments, ranks=8, share_prefix=share, backend=name, vision_cost=[400.0 * (i % 3) for i in range(64)]
            )
            for name in ("cpu", "native")
        ]
        assert plans[0] == plans[1]


@needs_compiler
def test_capacities_beyond_the_native_counters_are_packed_all_the_same() -> None:
    (bin_,) = pack_groups([10**12], [[10**13, 5]], 2 * 10**13, backend="native").bins
    assert bin_ == [(0, [0, 1])]
    assert len(pack_groups([3], [[4, 5]], 10**15, backend="native").bins) == 1


def test_never_more_bins_than_first_fit() -> None:
    for seed in range(200):
        prefixes, responses, capacity, options = problem(seed)
        plans = [pack_groups(prefixes, responses, capacity, backend=name, **options) for name in ("cpu", "reference")]
        assert len(plans[0].bins) <= len(plans[1].bins), seed


def test_a_group_is_cut_only_if_that_saves_bins_or_evens_the_ranks() -> None:
    """Where whole groups fit into as many bins, and leave the ranks even, none is cut."""
    saved = evened = 0
    for seed in range(200):
        prefixes, responses, capacity, options = problem(seed)
        options |= {"split": True, "share_prefix": True}
        if any(p + sum(r) > capacity for p, r in zip(prefixes, responses, strict=True)):
            continue
        plan = pack_groups(prefixes, responses, capacity, **options)
        whole = pack_groups(prefixes, responses, capacity, **(options | {"split": False}))
        homes = [group for bin_ in plan.bins for group, _ in bin_]
        if len(homes) != len(set(homes)):
            if len(plan.bins) == len(whole.bins):
                evened += 1
                assert whole.imbalance > 1.01 and max(plan.rank_costs) < max(whole.rank_costs)
            else:
                saved += 1
                assert len(plan.bins) < len(whole.bins)
    assert saved > 2 and evened > 2


def synthetic(groups: int, seed: int) -> tuple[list[int], list[list[int]]]:
    """Prompts of median 1200 tokens, 8 thinking responses of median 1500 and 8 direct ones of median 120."""
    rng = np.random.default_rng(seed)

    def lengths(median: float, spread: float, count: int, high: int) -> list[int]:
        return np.exp(rng.normal(np.log(median), spread, count)).astype(int).clip(8, high).tolist()

    prefixes = lengths(1200, 0.6, groups, 6000)
    return prefixes, [lengths(1500, 0.7, 8, 8192) + lengths(120, 0.5, 8, 2000) for _ in range(groups)]


@pytest.mark.parametrize(("capacity", "bar"), [(16384, 0.93), (32768, 0.97), (65536, 0.985)])
def test_fill_of_shared_groups(capacity: int, bar: float) -> None:
    """256 prompts, 4096 responses: the bins are fuller than whole groups or a plain split leave them."""
    fills = [pack_groups(*synthetic(256, seed), capacity).fill for seed in range(4)]
    assert sum(fills) / len(fills) >= bar


def test_ranks_are_even() -> None:
    for seed in range(12):
        prefixes, responses = synthetic(64, seed)
        vision = [400.0 * (seed + i % 3) for i in range(64)]
        for capacity in (16384, 32768, 65536):
            plan = pack_groups(prefixes, responses, capacity, ranks=8, vision_cost=vision)
            assert plan.imbalance <= 1.01, (seed, capacity)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_few_groups_are_cut_to_even_the_ranks(backend: str) -> None:
    """With about as many groups as ranks, a rank would have two and another one: the step takes as long as the two."""
    capacity, dearest = 16384, []
    for seed in range(8):
        prefixes, responses = synthetic(9, seed)
        plans = [
            pack_groups(
                prefixes, responses, capacity * 4, ranks=8, vision_cost=[900.0] * 9, split=split, backend=backend
            )
            for split in (False, True)
        ]
        whole, cut = plans
        assert len(cut.bins) == len(whole.bins) == 8
        assert cut.imbalance <= 1.1 < whole.imbalance, seed
        dearest.append(max(cut.rank_costs) / max(whole.rank_costs))
    assert sum(dearest) / len(dearest) < 0.8


def test_sequences_pack_full() -> None:
    """Plain packing: prefix 0 and one response each."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(7, 1, 1024)).astype(int).clip(1, 16384).tolist()
    plan = pack_groups([0] * 1024, [[n] for n in lengths], 16384, ranks=8)
    assert plan.fill > 0.99 and plan.imbalance < 1.001


@needs_compiler
@pytest.mark.parametrize("share_prefix", [True, False])
def test_it_is_fast(share_prefix: bool) -> None:
    """1024 responses in at most 5 ms; it takes about 1."""
    prefixes, responses = synthetic(64, 0)
    options = {"ranks": 8, "share_prefix": share_prefix, "backend": "native"}
    assert min(_seconds(lambda: pack_groups(prefixes, responses, 32768, **options)) for _ in range(5)) < 0.005


def _seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def test_cost_counts_pairs_tokens_and_images() -> None:
    """By hand: prefix 3, responses 2 and 4; own pairs 6 + 3 + 10, prefix pairs 6 + 12; images once per bin."""
    plan = pack_groups([3], [[2, 4]], 20, vision_cost=[100.0], cost=PackCost(token=10.0, pair=1.0))
    assert plan.bin_costs == [10.0 * 9 + (6 + 3 + 10 + 6 + 12) + 100.0]
    alone = pack_groups([3], [[2, 4]], 20, vision_cost=[100.0], cost=PackCost(10.0, 1.0), share_prefix=False)
    assert alone.bin_costs == [10.0 * 12 + (12 + 3 + 10 + 6 + 12) + 200.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_cases(backend: str) -> None:
    shared = pack_groups([4], [[2, 2, 2]], 10, backend=backend)
    assert shared.bins == [[(0, [0, 1, 2])]] and shared.fill == 1.0
    apart = pack_groups([4], [[2, 2, 2]], 10, share_prefix=False, backend=backend)
    assert sorted(apart.bin_tokens) == [6, 6, 6]
    cut = pack_groups([4], [[5, 5]], 10, ranks=3, backend=backend)
    assert sorted(cut.bin_tokens) == [0, 9, 9] and cut.ranks.count([[]]) == 1
    assert pack_groups([], [], 10, ranks=2, backend=backend).ranks == [[], []]
    assert pack_groups([7], [[]], 10, backend=backend).bins == []


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (([1], [[1], [2]], 8), {}, "prefix_lengths has 1"),
        (([1, 9], [[1], [2]], 8), {}, "group 1.*capacity=8"),
        (([1], [[4, 4]], 8), {"split": False}, "group 0.*split"),
        (([-1], [[4]], 8), {}, "group 0"),
        (([1], [[-4]], 8), {}, "group 0"),
        (([1], [[4]], 0), {}, "capacity=0"),
        (([1], [[4]], 8), {"ranks": 0}, "ranks=0"),
        (([1], [[4]], 8), {"vision_cost": [1.0, 2.0]}, "vision_cost"),
        (([1], [[4]], 8), {"vision_cost": [float("nan")]}, "vision_cost"),
        (([1], [[4]], 8), {"cost": PackCost(float("inf"))}, "cost="),
        (([1], [[4]], 8), {"backend": "abacus"}, "abacus"),
    ],
)
def test_errors_name_the_argument(arguments, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack_groups(*arguments, **options)
    assert issubclass(dispatch.BackendError, ValueError)

"""The plain way to pack: first fit, larger groups first, a group cut only where it does not fit whole."""

from __future__ import annotations

from r4b_kernels.pack_groups.plan import Bin, PackPlan, Problem, finish


def pack(problem: Problem) -> PackPlan:
    bins: list[Bin] = []
    loads: list[int] = []

    def place(group: int, members: list[int]) -> None:
        size = problem.tokens(group, members)
        for b in range(len(bins)):
            if loads[b] + size <= problem.capacity:
                break
        else:
            b = len(bins)
            bins.append([])
            loads.append(0)
        bins[b].append((group, members))
        loads[b] += size

    everything = [list(range(len(lengths))) for lengths in problem.responses]
    for group in sorted(range(len(everything)), key=lambda g: (-problem.tokens(g, everything[g]), g)):
        piece: list[int] = []
        for member in everything[group]:
            if piece and problem.tokens(group, [*piece, member]) > problem.capacity:
                place(group, piece)
                piece = []
            piece.append(member)
        if piece:
            place(group, piece)
    bins += [[] for _ in range(-len(bins) % problem.ranks)]
    return deal(problem, [merge(bin_) for bin_ in bins])


def merge(bin_: Bin) -> Bin:
    """One entry per group, ascending: two pieces of a group may have met in a bin."""
    members: dict[int, list[int]] = {}
    for group, piece in bin_:
        members.setdefault(group, []).extend(piece)
    return [(group, sorted(piece)) for group, piece in sorted(members.items())]


def deal(problem: Problem, bins: list[Bin]) -> PackPlan:
    """Dearest bin first, each to the cheapest rank that still lacks bins."""
    costs = [problem.cost_of(bin_) for bin_ in bins]
    per_rank = len(bins) // problem.ranks
    rank_costs, counts, rank_of_bin = [0.0] * problem.ranks, [0] * problem.ranks, [0] * len(bins)
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        rank = min((r for r in range(problem.ranks) if counts[r] < per_rank), key=lambda r: (rank_costs[r], r))
        rank_of_bin[b] = rank
        rank_costs[rank] += costs[b]
        counts[rank] += 1
    return finish(problem, bins, rank_of_bin, costs)

"""CPU backend of pack_groups: for a number of bins, try a few orders of best fit; search for the smallest number.

Groups are placed whole, each into the fullest bin that takes it. When no bin does and all are open, the group is cut:
its responses, longest first, fill the emptiest bin, and the rest goes on. The order decides what is left for cutting at
the end, and should leave groups whose prefix is cheap to pay again and whose responses are small enough for the gaps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from r4b_kernels.pack_groups.plan import Bin, PackPlan, Problem, finish
from r4b_kernels.pack_groups.reference import merge

_SMALLER_CAPACITIES = 5
_SHIFTS = 32
# Largest over mean cost of a rank from which on nothing more is done, and from which on no group is cut for it.
_EVEN = 1.002
_EVEN_ENOUGH = 1.01
# Costs are floats: an exchange must gain more than their rounding.
_GAIN = 1e-9
# What a cut must take from the dearer of two ranks, as a share of the gap between them.
_LEAST_CUT = 1 / 16


@dataclass(frozen=True)
class _Items:
    """What is placed: atoms (length, member) in ascending order under a prefix that each bin pays once.

    With a shared prefix an item is a group; without, a response, its prefix counted in.
    """

    prefixes: list[int]
    atoms: list[list[tuple[int, int]]]
    groups: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class _Packing:
    """``pieces[b]`` is what bin b holds, as (item, members); ``tokens`` counts prefixes as often as they are paid.

    Items of at most ``whole_up_to`` tokens were not allowed to be cut.
    """

    pieces: list[list[tuple[int, list[int]]]]
    tokens: int
    whole_up_to: int


def pack(problem: Problem) -> PackPlan:
    items = _items_of(problem)
    if not items.groups:
        return finish(problem, [], [], [])
    orders = _orders(items)
    best = _fewest_bins(problem, items, orders)
    plan = _deal(problem, _bins_of(items, best))
    if problem.ranks == 1:
        return plan
    return _shifted(problem, _evened(problem, items, orders, best, plan))


def _items_of(problem: Problem) -> _Items:
    if problem.share_prefix:
        groups = [g for g, lengths in enumerate(problem.responses) if lengths]
        prefixes = [problem.prefixes[g] for g in groups]
        atoms = [sorted((n, m) for m, n in enumerate(problem.responses[g])) for g in groups]
    else:
        pairs = [(g, m) for g, lengths in enumerate(problem.responses) for m in range(len(lengths))]
        groups = [g for g, _ in pairs]
        prefixes = [0] * len(pairs)
        atoms = [[(problem.prefixes[g] + problem.responses[g][m], m)] for g, m in pairs]
        if not problem.split:
            return _whole_groups(groups, atoms)
    sizes = [prefix + sum(n for n, _ in list_) for prefix, list_ in zip(prefixes, atoms, strict=True)]
    return _Items(prefixes, atoms, groups, sizes)


def _whole_groups(groups: list[int], atoms: list[list[tuple[int, int]]]) -> _Items:
    """Unshared prefixes, yet groups that must stay together: all atoms of a group under a prefix of 0."""
    together: dict[int, list[tuple[int, int]]] = {}
    for group, (atom,) in zip(groups, atoms, strict=True):
        together.setdefault(group, []).append(atom)
    sizes = [sum(n for n, _ in members) for members in together.values()]
    return _Items([0] * len(together), [sorted(members) for members in together.values()], list(together), sizes)


def _orders(items: _Items) -> list[list[int]]:
    """Descending by size, by what the smallest home must hold, and by a mixture."""
    prefixes, sizes, atoms = items.prefixes, items.sizes, items.atoms
    indices = range(len(sizes))
    orders = [sorted(indices, key=lambda i: (-sizes[i], i))]
    if any(len(list_) > 1 for list_ in atoms):
        orders.append(sorted(indices, key=lambda i: (-prefixes[i] - atoms[i][-1][0], i)))
        orders.append(sorted(indices, key=lambda i: (-16 * prefixes[i] - sizes[i], i)))
    return orders


def _fewest_bins(problem: Problem, items: _Items, orders: list[list[int]]) -> _Packing:
    """Gallop and bisect over the bins per rank; then keep groups whole if that many bins allow it."""

    def attempts(per_rank: int, whole_up_to: int) -> Iterator[_Packing]:
        for order in orders:
            packing = _attempt(items, order, problem.capacity, per_rank * problem.ranks, whole_up_to)
            if packing is not None:
                yield packing

    whole_up_to = 0 if problem.split else problem.capacity
    enough, step = max(-(-sum(items.sizes) // (problem.capacity * problem.ranks)), 1), 1
    failed = enough - 1
    while (best := next(attempts(enough, whole_up_to), None)) is None:
        failed, enough, step = enough, enough + step, 2 * step
    while enough - failed > 1:
        middle = (failed + enough) // 2
        if (packing := next(attempts(middle, whole_up_to), None)) is None:
            failed = middle
        else:
            best, enough = packing, middle
    if problem.split and len(orders) > 1:
        candidates = list(attempts(enough, problem.capacity)) or list(attempts(enough, 0))
        best = min(candidates, key=lambda packing: packing.tokens)
    return best


def _attempt(items: _Items, order: list[int], capacity: int, count: int, whole_up_to: int) -> _Packing | None:
    """Place everything into ``count`` bins, or None. Cuts only what exceeds ``whole_up_to`` tokens."""
    tokens, room = sum(items.sizes), count * capacity
    if tokens > room:
        return None
    pieces: list[list[tuple[int, list[int]]]] = [[] for _ in range(count)]
    used: list[tuple[int, int]] = []  # (free tokens, bin) of the bins that are open, ascending
    opened = 0
    for item in order:
        lengths: list[int] | None = None
        members: list[int] = []
        prefix, size = items.prefixes[item], items.sizes[item]
        while True:
            if (i := bisect_left(used, (size, -1))) < len(used):
                free, b = used.pop(i)
            elif opened < count:
                free, b = capacity, opened
                opened += 1
            elif used:
                free, b = used.pop()
            else:
                return None
            if size <= free:
                pieces[b].append((item, [m for _, m in items.atoms[item]] if lengths is None else members))
                insort(used, (free - size, b))
                break
            if items.sizes[item] <= whole_up_to:
                return None
            if lengths is None:
                lengths = [n for n, _ in items.atoms[item]]
                members = [m for _, m in items.atoms[item]]
            gap, taken = free - prefix, []
            while lengths and (k := bisect_right(lengths, gap) - 1) >= 0:
                gap -= lengths.pop(k)
                taken.append(members.pop(k))
            if not taken:
                return None
            pieces[b].append((item, taken))
            insort(used, (gap, b))
            size = prefix + sum(lengths)
            tokens += prefix
            if tokens > room:
                return None
    return _Packing(pieces, tokens, whole_up_to)


def _bins_of(items: _Items, packing: _Packing) -> list[Bin]:
    return [merge([(items.groups[item], part) for item, part in pieces]) for pieces in packing.pieces]


def _deal(problem: Problem, bins: list[Bin]) -> PackPlan:
    """Dearest bin first to the cheapest rank that lacks bins; then exchanges that lower the dearest rank."""
    costs = [problem.cost_of(bin_) for bin_ in bins]
    per_rank = len(bins) // problem.ranks
    shares: list[list[int]] = [[] for _ in range(problem.ranks)]
    totals = [0.0] * problem.ranks
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        rank = min((r for r in range(problem.ranks) if len(shares[r]) < per_rank), key=lambda r: (totals[r], r))
        shares[rank].append(b)
        totals[rank] += costs[b]
    for _ in range(4 * len(bins)):
        if not _exchange(shares, totals, costs):
            break
    rank_of_bin = [0] * len(bins)
    for rank, share in enumerate(shares):
        for b in share:
            rank_of_bin[b] = rank
    return finish(problem, bins, rank_of_bin, costs)


def _exchange(shares: list[list[int]], totals: list[float], costs: list[float]) -> bool:
    """Swap one bin of the dearest rank with one of the cheapest rank that helps; False if none does."""
    ranks = sorted(range(len(totals)), key=lambda r: (totals[r], r))
    dearest = ranks.pop()
    for other in ranks:
        gap = totals[dearest] - totals[other]
        best, swap = gap * (1 - _GAIN), None
        for i, mine in enumerate(shares[dearest]):
            for j, theirs in enumerate(shares[other]):
                left = abs(gap - 2 * (costs[mine] - costs[theirs]))
                if left < best:
                    best, swap = left, (i, j)
        if swap is not None:
            i, j = swap
            mine, theirs = shares[dearest][i], shares[other][j]
            shares[dearest][i], shares[other][j] = theirs, mine
            totals[dearest] += costs[theirs] - costs[mine]
            totals[other] += costs[mine] - costs[theirs]
            return True
    return False


def _evened(problem: Problem, items: _Items, orders: list[list[int]], packing: _Packing, plan: PackPlan) -> PackPlan:
    """The same number of bins under a smaller capacity, where that evens the ranks and cuts nothing more."""
    count = len(plan.bins)
    low, high = max(-(-packing.tokens // count), 1), problem.capacity
    for _ in range(_SMALLER_CAPACITIES):
        if plan.imbalance < _EVEN or high <= low:
            break
        capacity = (low + high) // 2
        better = None
        for order in orders:
            candidate = _attempt(items, order, capacity, count, packing.whole_up_to)
            if candidate is not None and candidate.tokens <= packing.tokens:
                dealt = _deal(problem, _bins_of(items, candidate))
                if dealt.imbalance < plan.imbalance:
                    plan, better = dealt, candidate
        low, high = (low, capacity) if better is not None else (capacity + 1, high)
    return plan


@dataclass(frozen=True)
class _Offer:
    """What may leave a bin: members of the piece ``bins[bin_][index]`` of a group, all of them but for a cut."""

    bin_: int
    index: int
    group: int
    members: list[int]
    cost: float
    tokens: int


def _shifted(problem: Problem, plan: PackPlan) -> PackPlan:
    """Pieces moved or swapped between bins of the dearest and of a cheaper rank, while that lowers the dearer of both.

    Pieces go as they are, to bins that hold nothing of their group: no group is cut and no prefix is paid again. Where
    that is not enough, and ``split`` allows it, responses of a piece go.
    """
    bins, costs, tokens = [list(bin_) for bin_ in plan.bins], list(plan.bin_costs), list(plan.bin_tokens)
    totals = list(plan.rank_costs)
    shares: list[list[int]] = [[] for _ in totals]
    for b, rank in enumerate(plan.rank_of_bin):
        shares[rank].append(b)
    for _ in range(_SHIFTS):
        ranks = sorted(range(len(totals)), key=lambda r: (totals[r], r))
        dearest = ranks.pop()
        mean = reduce(add, totals) / problem.ranks
        if totals[dearest] <= _EVEN * mean:
            break
        mine = _offers(problem, bins, shares[dearest])
        for other in ranks:
            theirs = _offers(problem, bins, shares[other])
            swap = _best_swap(problem, bins, tokens, mine, theirs, shares[other], totals[dearest] - totals[other])
            if swap is not None:
                break
        else:
            if not problem.split or totals[dearest] <= _EVEN_ENOUGH * mean:
                break
            other = ranks[0]
            swap = _best_cut(problem, bins, tokens, mine, shares[other], totals[dearest] - totals[other])
            if swap is None:
                break
        give, take, target = swap
        group, members = bins[give.bin_].pop(give.index)
        if take is not None:
            bins[give.bin_].append(bins[target].pop(take.index))
        if len(give.members) < len(members):
            bins[give.bin_].append((group, [m for m in members if m not in give.members]))
        bins[target].append((group, give.members))
        for b, rank in ((give.bin_, dearest), (target, other)):
            bins[b] = merge(bins[b])
            before, costs[b] = costs[b], problem.cost_of(bins[b])
            totals[rank] += costs[b] - before
            tokens[b] = sum(problem.tokens(group, members) for group, members in bins[b])
    return finish(problem, bins, plan.rank_of_bin, costs)


def _offers(problem: Problem, bins: list[Bin], share: list[int]) -> list[_Offer]:
    return [
        _Offer(b, i, *piece, problem.cost_of([piece]), problem.tokens(*piece))
        for b in share
        for i, piece in enumerate(bins[b])
    ]


def _best_swap(
    problem: Problem,
    bins: list[Bin],
    tokens: list[int],
    mine: list[_Offer],
    theirs: list[_Offer],
    targets: list[int],
    gap: float,
) -> tuple[_Offer, _Offer | None, int] | None:
    """(what to give, what to take for it or None, the bin to give it to): what leaves least of the gap."""
    groups = {b: {group for group, _ in bins[b]} for b in [*targets, *(give.bin_ for give in mine)]}
    best = gap * (1 - _GAIN)
    swap: tuple[_Offer, _Offer | None, int] | None = None
    for give in mine:
        for target in targets:
            left = abs(gap - 2 * give.cost)
            fits = tokens[target] + give.tokens <= problem.capacity
            if left < best and fits and give.group not in groups[target]:
                best, swap = left, (give, None, target)
        for take in theirs:
            left = abs(gap - 2 * (give.cost - take.cost))
            if left >= best or give.group in groups[take.bin_] or take.group in groups[give.bin_]:
                continue
            more = give.tokens - take.tokens
            if tokens[take.bin_] + more <= problem.capacity and tokens[give.bin_] - more <= problem.capacity:
                best, swap = left, (give, take, take.bin_)
    return swap


def _best_cut(
    problem: Problem, bins: list[Bin], tokens: list[int], mine: list[_Offer], targets: list[int], gap: float
) -> tuple[_Offer, None, int] | None:
    """The same for some of a piece's responses: the most cost that can go without making the other rank the dearer."""
    best = gap * _LEAST_CUT
    swap: tuple[_Offer, None, int] | None = None
    for give in mine:
        again = problem.cost_of([(give.group, [])])  # of the prefix, which a bin pays that did not hold the group
        fixed, each = (problem.prefixes[give.group], 0) if problem.share_prefix else (0, problem.prefixes[give.group])
        costs = sorted((again - problem.cost_of([(give.group, [m])]), m) for m in give.members)
        for target in targets:
            known = any(group == give.group for group, _ in bins[target])
            goal = (gap if known else gap - again) / 2
            room = problem.capacity - tokens[target] - (0 if known else fixed)
            members: list[int] = []
            gone, used = 0.0, 0
            for negative, member in costs:
                size = problem.responses[give.group][member] + each
                if gone - negative <= goal and used + size <= room and len(members) + 1 < len(costs):
                    members.append(member)
                    gone, used = gone - negative, used + size
            if gone > best:
                best, swap = gone, (replace(give, members=sorted(members), cost=gone, tokens=used), None, target)
    return swap

"""C++ backend of pack_groups: the same plan as the cpu backend's, bit for bit (csrc/cpu/pack_groups.cpp)."""

from __future__ import annotations

from itertools import accumulate, chain

import torch

from r4b_kernels.pack_groups import cpu
from r4b_kernels.pack_groups.plan import Bin, PackPlan, Problem

# Attention pairs of a bin, at most its tokens squared, are counted in 64 bits.
_MOST_TOKENS = 2**31
_MOST_CAPACITY = 2**40


def pack(problem: Problem) -> PackPlan:
    if problem.unique_tokens >= _MOST_TOKENS or problem.capacity * problem.ranks >= _MOST_CAPACITY:
        return cpu.pack(problem)
    lengths = list(chain.from_iterable(problem.responses))
    offsets = [0, *accumulate(map(len, problem.responses))]
    pieces, members, bins, costs = torch.ops.r4b_native.pack_groups(
        torch.tensor(problem.prefixes, dtype=torch.int64, device="cpu"),
        torch.tensor(lengths, dtype=torch.int64, device="cpu"),
        torch.tensor(offsets, dtype=torch.int64, device="cpu"),
        torch.tensor(problem.vision, dtype=torch.float64, device="cpu"),
        problem.capacity,
        problem.ranks,
        problem.share_prefix,
        problem.split,
        *problem.cost,
    )
    placed: list[int] = members.tolist()
    content: list[Bin] = [[] for _ in range(bins.shape[0])]
    start = 0
    for bin_, group, size in pieces.tolist():
        content[bin_].append((group, placed[start : start + size]))
        start += size
    ranks, tokens = bins.T.tolist()
    return PackPlan(content, ranks, tokens, costs.tolist(), problem.capacity, problem.ranks, problem.unique_tokens)

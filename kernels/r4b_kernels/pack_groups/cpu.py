"""CPU backend of pack_groups. The first version packs as the reference does."""

from __future__ import annotations

from r4b_kernels.pack_groups.plan import PackPlan, Problem
from r4b_kernels.pack_groups.reference import pack as first_fit


def pack(problem: Problem) -> PackPlan:
    return first_fit(problem)

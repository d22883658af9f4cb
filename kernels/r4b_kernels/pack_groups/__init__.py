"""Packing of groups of responses into bins of fixed token capacity, balanced over ranks. Host code, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from r4b_kernels import dispatch, native
from r4b_kernels.pack_groups import cpu, reference
from r4b_kernels.pack_groups.plan import Bin, PackCost, PackPlan, Problem

__all__ = ["Bin", "PackCost", "PackPlan", "pack_groups"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("pack_groups", "native", "r4b_kernels.pack_groups.native:pack", native.cpu_available)
dispatch.register("pack_groups", "cpu", cpu.pack, dispatch.only_on("cpu"))
dispatch.register("pack_groups", "reference", reference.pack)


def pack_groups(
    prefix_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    capacity: int,
    *,
    ranks: int = 1,
    share_prefix: bool = True,
    vision_cost: Sequence[float] | None = None,
    cost: PackCost | None = None,
    split: bool = True,
    backend: str | None = None,
) -> PackPlan:
    """Place every response of every group into bins of ``capacity`` tokens, the same number of bins on each rank.

    A group is a prefix (its prompt) and the responses to it. With ``share_prefix`` a bin holds a group's prefix once,
    whatever the number of its responses there; without, each response brings its own. Plain sequence packing is the
    case of prefix 0 and one response per group.

    The plan keeps to these rules:
      1. every response is in exactly one bin;
      2. the tokens of a bin, prefixes included, do not exceed ``capacity``;
      3. a group is in more than one bin only with ``split``, and then only because it does not fit into one bin,
         because keeping it whole would need more bins, or because the dearest rank gets cheaper by it;
      4. every rank has the same number of bins, empty ones among them if need be, so that pipeline schedules and
         collectives stay in step; no plan has more bins than that asks for;
      5. bins are shared out, and pieces of groups moved between them, so that the ranks' costs are as even as a greedy
         assignment with exchanges gets them;
      6. the same arguments give the same plan.

    Args:
        prefix_lengths: tokens of each group's prefix, 0 or more.
        response_lengths: tokens of each response, per group, 0 or more.
        capacity: tokens per bin.
        ranks: data-parallel ranks.
        share_prefix: charge a group's prefix once per bin.
        vision_cost: per group, the cost of encoding its images, in the unit of ``cost`` (tokens by default); paid once
            in each bin that holds the group (by each response without ``share_prefix``).
        cost: weights of the cost model, see PackCost.
        split: allow a group in several bins. Without it a group larger than the capacity is an error.
        backend: "native", "cpu" or "reference"; None takes the first that is there.

    Raises:
        ValueError: naming the argument or the group: a negative length, lists of different sizes, a cost that is not
            finite, a prefix with one response (with ``split=False``: with all its responses) that exceeds the capacity.
    """
    prefixes = [int(length) for length in prefix_lengths]
    responses = [[int(length) for length in group] for group in response_lengths]
    if len(prefixes) != len(responses):
        raise ValueError(f"prefix_lengths has {len(prefixes)} groups and response_lengths {len(responses)}")
    vision = [0.0] * len(prefixes) if vision_cost is None else [float(value) for value in vision_cost]
    if len(vision) != len(prefixes):
        raise ValueError(f"vision_cost has {len(vision)} entries for {len(prefixes)} groups")
    cost = cost or PackCost()
    if not all(map(math.isfinite, vision)):
        raise ValueError("vision_cost: every group's cost must be finite")
    if not all(map(math.isfinite, cost)):
        raise ValueError(f"cost={cost}: its weights must be finite")
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: must be at least 1 token")
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: must be at least 1")
    for group, (prefix, lengths) in enumerate(zip(prefixes, responses, strict=True)):
        if prefix < 0 or min(lengths, default=0) < 0:
            raise ValueError(f"group {group}: prefix_lengths and response_lengths must not be negative")
        if lengths and prefix + max(lengths) > capacity:
            raise ValueError(
                f"group {group}: its prefix of {prefix} tokens and its response of {max(lengths)} exceed "
                f"capacity={capacity}: raise the capacity or shorten the group"
            )
        whole = sum(lengths) + prefix * (1 if share_prefix else len(lengths))
        if lengths and not split and whole > capacity:
            raise ValueError(
                f"group {group}: it has {whole} tokens and capacity={capacity}: allow split=True or raise the capacity"
            )
    problem = Problem(prefixes, responses, int(capacity), ranks, share_prefix, vision, cost, split)
    return dispatch.resolve("pack_groups", torch.device("cpu"), backend)(problem)

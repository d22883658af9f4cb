"""CPU backend of group_advantage: segment sums in float64, no loop over groups."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.group_advantage.reference import complete


def forward(
    rewards: Tensor,
    group_offsets: Tensor,
    mode: Tensor,
    baseline: str,
    std: bool,
    eps: float,
    token_offsets: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(advantage, token_advantage, live, live_rows, num_live): see group_advantage."""
    return complete(advantages(rewards, group_offsets, mode, baseline, std, eps), token_offsets, num_tokens)


def advantages(rewards: Tensor, group_offsets: Tensor, mode: Tensor, baseline: str, std: bool, eps: float) -> Tensor:
    """float64 [N]."""
    num_groups = group_offsets.numel() - 1
    exact = rewards.to(torch.float64)
    lengths = group_offsets.diff().to(torch.int64)
    segment = torch.arange(num_groups).repeat_interleave(lengths, output_size=rewards.numel())
    if baseline == "per_mode":
        segment = segment * 2 + mode.to(torch.int64)
        num_groups *= 2
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    count = zeros.index_add(0, segment, torch.ones_like(exact))
    mean = zeros.index_add(0, segment, exact) / count.clamp_min(1)
    difference = exact - mean[segment]
    variance = zeros.index_add(0, segment, difference.square()) / (count - 1).clamp_min(1)
    lowest = torch.scatter_reduce(zeros, 0, segment, exact, "amin", include_self=False)
    highest = torch.scatter_reduce(zeros, 0, segment, exact, "amax", include_self=False)
    if baseline == "leave_one_out":
        # r - mean of the others = (r - mean of all) * n / (n - 1)
        difference = difference * (count / (count - 1).clamp_min(1))[segment]
    if std:
        difference = difference / (variance.sqrt() + eps)[segment]
    return difference.masked_fill_((lowest == highest)[segment], 0.0)

"""The definition of group_advantage: a loop over groups and modes, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


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
    exact = rewards.to(torch.float64)
    advantage = torch.zeros_like(exact)
    offsets = group_offsets.tolist()
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        members = torch.arange(start, stop, device=rewards.device)
        sets = [members] if baseline != "per_mode" else [members[mode[start:stop] == m] for m in (0, 1)]
        for index in sets:
            advantage[index] = _of_set(exact[index], baseline, std, eps)
    return advantage


def _of_set(rewards: Tensor, baseline: str, std: bool, eps: float) -> Tensor:
    n = rewards.numel()
    if n < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    others = (rewards.sum() - rewards) / (n - 1)
    difference = rewards - (others if baseline == "leave_one_out" else rewards.mean())
    return difference / (rewards.std(correction=1) + eps) if std else difference


def complete(
    advantage: Tensor, token_offsets: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All results of the op from the float64 advantages [N]."""
    advantage = advantage.to(torch.float32)
    tokens = advantage.new_empty(0)
    if token_offsets is not None:
        tokens = advantage.repeat_interleave(token_offsets.diff().to(torch.int64), output_size=num_tokens)
    live = advantage != 0
    rows = live.nonzero()[:, 0].to(torch.int32)
    live_rows = torch.cat([rows, rows.new_full((live.numel() - rows.numel(),), -1)])
    return advantage, tokens, live, live_rows, live.sum(dtype=torch.int32)

"""CUDA C++ backend of group_advantage (csrc/cuda/group_advantage.cu): one launch for everything.

Compiled and emulated, never run on a GPU so far: it serves only who asks for it by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of csrc/cuda/group_advantage.cu.
_BASELINES = ("union", "per_mode", "leave_one_out")


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
    num_rows = rewards.numel()
    advantage = rewards.new_empty(num_rows, dtype=torch.float32)
    token_advantage = rewards.new_empty(num_tokens, dtype=torch.float32)
    live = rewards.new_empty(num_rows, dtype=torch.bool)
    live_rows = rewards.new_empty(num_rows, dtype=torch.int32)
    num_live = rewards.new_empty((), dtype=torch.int32)
    torch.ops.r4b_native.group_advantage(
        (rewards if rewards.dtype == torch.float64 else rewards.to(torch.float32)).contiguous(),
        _integers(group_offsets),
        _integers(mode),
        None if token_offsets is None else _integers(token_offsets),
        _BASELINES.index(baseline),
        std,
        eps,
        advantage,
        token_advantage,
        live,
        live_rows,
        num_live,
    )
    return advantage, token_advantage, live, live_rows, num_live


def _integers(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.int32, torch.int64) else x.to(torch.int32)).contiguous()

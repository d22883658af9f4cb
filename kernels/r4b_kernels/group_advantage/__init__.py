"""Advantages of a group's responses: against the union of both modes, against one's own mode, or against the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.group_advantage import cpu, reference

__all__ = ["BASELINES", "Advantage", "group_advantage"]

BASELINES = ("union", "per_mode", "leave_one_out")

# Order is preference: the reference serves only where nothing better does.
dispatch.register("group_advantage", "cpu", cpu.forward, dispatch.only_on("cpu"))
dispatch.register("group_advantage", "triton", "r4b_kernels.group_advantage.triton:forward", dispatch.where_triton_runs)
dispatch.register("group_advantage", "reference", reference.forward)
# Last, so that it serves only who asks for it by name: it has never run on a GPU.
dispatch.register("group_advantage", "cuda", "r4b_kernels.group_advantage.cuda:forward", native.cuda_available)


class Advantage(NamedTuple):
    """What group_advantage returns.

    Attributes:
        advantage: float32 [N].
        token_advantage: float32 [num_tokens], each response's advantage on its tokens; None without token_offsets.
        live: bool [N], the responses whose advantage is not 0: the others teach nothing (unless a KL term does).
        live_rows: int32 [N], the indices of the live responses in ascending order, then -1.
        num_live: int32 scalar, how many of ``live_rows`` count. On the device: nothing waits for it.
    """

    advantage: Tensor
    token_advantage: Tensor | None
    live: Tensor
    live_rows: Tensor
    num_live: Tensor


def group_advantage(
    rewards: Tensor,
    group_offsets: Tensor,
    mode: Tensor,
    *,
    baseline: str = "union",
    std: bool = True,
    eps: float = 1e-6,
    token_offsets: Tensor | None = None,
    num_tokens: int | None = None,
    backend: str | None = None,
) -> Advantage:
    """(reward - baseline) / (standard deviation + eps), per response; no gradients.

    The set of a response is its group ("union": BPO, R-4B Eq. 1; "leave_one_out") or the members of its group in its
    own mode ("per_mode"). The baseline is the set's mean, for "leave_one_out" the mean of the set's other members. The
    standard deviation is the set's, unbiased (n - 1), as in GRPO's public implementations; ``std=False`` leaves the
    division out (Dr. GRPO). The advantage is exactly 0 where all rewards of the set are equal, and in a set of one.

    Args:
        rewards: floating-point [N], group by group.
        group_offsets: int32 or int64 [G+1]; group g is ``rewards[group_offsets[g]:group_offsets[g+1]]``. From 0 to N.
        mode: integer [N], 0 direct, 1 thinking.
        baseline: "union", "per_mode" or "leave_one_out".
        std: divide by the standard deviation.
        eps: added to the standard deviation.
        token_offsets: int32 or int64 [N+1]; response n has the tokens ``token_offsets[n]:token_offsets[n+1]``. From 0.
        num_tokens: ``token_offsets[-1]``; without it that entry is read, which waits for the device on a GPU.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes or devices or an unknown baseline; on the CPU also for
            offsets that do not cover the input, a mode that is neither 0 nor 1, and a reward that is not finite. On a
            GPU such values are not waited for: a group that holds one gets NaN, and counts as live.
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating-point [N], it is {rewards.dtype} {tuple(rewards.shape)}")
    if mode.shape != rewards.shape or mode.is_floating_point():
        raise ValueError(f"mode must be integer [N] with N={rewards.numel()}, it is {mode.dtype} {tuple(mode.shape)}")
    if group_offsets.dim() != 1 or group_offsets.numel() == 0 or group_offsets.is_floating_point():
        raise ValueError(
            f"group_offsets must be integer [G+1], it is {group_offsets.dtype} {tuple(group_offsets.shape)}"
        )
    if token_offsets is not None and (
        token_offsets.shape != (rewards.numel() + 1,) or token_offsets.is_floating_point()
    ):
        raise ValueError(
            f"token_offsets must be integer [N+1] with N={rewards.numel()}, it is {token_offsets.dtype} "
            f"{tuple(token_offsets.shape)}"
        )
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: must be one of {', '.join(BASELINES)}")
    dispatch.check_devices(
        "rewards", rewards.device, group_offsets=group_offsets, mode=mode, token_offsets=token_offsets
    )
    if token_offsets is None and num_tokens is not None:
        raise ValueError(f"num_tokens={num_tokens} needs token_offsets: it is their last entry")
    if token_offsets is None:
        num_tokens = 0
    elif num_tokens is None:
        num_tokens = int(token_offsets[-1])
    advantage, token_advantage, *live = _group_advantage(
        rewards.detach(), group_offsets, mode, baseline, std, float(eps), token_offsets, num_tokens, backend
    )
    return Advantage(advantage, None if token_offsets is None else token_advantage, *live)


@torch.library.custom_op("r4b_kernels::group_advantage", mutates_args=())
def _group_advantage(
    rewards: Tensor,
    group_offsets: Tensor,
    mode: Tensor,
    baseline: str,
    std: bool,
    eps: float,
    token_offsets: Tensor | None,
    num_tokens: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if rewards.device.type == "cpu":
        _check_values(rewards, group_offsets, mode, token_offsets, num_tokens)
    implementation = dispatch.resolve("group_advantage", rewards.device, backend, rewards)
    return implementation(rewards, group_offsets, mode, baseline, std, eps, token_offsets, num_tokens)


@_group_advantage.register_fake
def _(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens = rest[-2]
    return (
        rewards.new_empty(rewards.shape, dtype=torch.float32),
        rewards.new_empty(num_tokens, dtype=torch.float32),
        rewards.new_empty(rewards.shape, dtype=torch.bool),
        rewards.new_empty(rewards.shape, dtype=torch.int32),
        rewards.new_empty((), dtype=torch.int32),
    )


def _check_values(
    rewards: Tensor, group_offsets: Tensor, mode: Tensor, token_offsets: Tensor | None, num_tokens: int
) -> None:
    for name, offsets, stop in (
        ("group_offsets", group_offsets, rewards.numel()),
        ("token_offsets", token_offsets, num_tokens),
    ):
        if offsets is None:
            continue
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != stop or bool((offsets.diff() < 0).any()):
            raise ValueError(f"{name} must rise from 0 to {stop} without falling, it goes from {first} to {last}")
    if bool(((mode != 0) & (mode != 1)).any()):
        raise ValueError(f"mode must be 0 (direct) or 1 (thinking), it holds {sorted(set(mode.tolist()))}")
    if not bool(torch.isfinite(rewards).all()):
        where = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(f"rewards[{where}] = {float(rewards[where])}: a reward must be finite")

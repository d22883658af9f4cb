"""GRPO's loss on policy_loss_head, over completions in rows of equal length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels.linear_logprob import linear_logprob
from r4b_kernels.policy_loss_head import PolicyLoss, policy_loss_head

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def row_weights(
    mask: Tensor, loss_type: str, *, max_completion_length: int | None = None, num_items: Tensor | float | None = None
) -> Tensor:
    """Each token's share of the loss, float32 [B, C], from the tokens that count, mask [B, C].

    "grpo" is the mean over sequences of their means, "bnpo" the mean over tokens, "dr_grpo" the sum divided by
    B * max_completion_length, "dapo" the sum divided by ``num_items``: the tokens of the accumulation window.
    """
    mask = mask.float()
    if loss_type == "grpo":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[0])
    if loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo" and max_completion_length:
        return mask / (mask.shape[0] * max_completion_length)
    if loss_type == "dapo" and num_items is not None:
        return mask / num_items
    raise ValueError(
        f"loss_type={loss_type!r}: expected one of {LOSS_TYPES}; dr_grpo needs max_completion_length, dapo num_items"
    )


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    row_weight: Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """policy_loss_head over B completions of C tokens; the metrics are [B, C].

    Args:
        hidden: [B, C, H], the states that predict ``ids``.
        weight: [V, H], the LM head.
        ids: int64 [B, C].
        advantages: [B] or [B, C].
        row_weight: [B, C], from ``row_weights``; where it is 0, nothing else is read.
        old_logprob: [B, C]; None right after sampling, where every ratio is 1 (costs one more forward product).
        ref_logprob: [B, C], for the KL term.
        options: clip_low, clip_high, kl_coef, temperature of policy_loss_head.
    """
    rows, target = hidden.reshape(-1, hidden.shape[-1]), torch.where(row_weight != 0, ids, -1).flatten()
    if old_logprob is None:
        temperature = options.get("temperature", 1.0)
        old_logprob, _ = linear_logprob(rows.detach(), weight.detach(), target, temperature=temperature)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(ids)
    values = (x.flatten() for x in (old_logprob, advantages, row_weight))
    ref = None if ref_logprob is None else ref_logprob.flatten()
    loss, *metrics = policy_loss_head(rows, weight, target, *values, ref_logprob=ref, **options)
    return PolicyLoss(loss, *(metric.view_as(ids) for metric in metrics))

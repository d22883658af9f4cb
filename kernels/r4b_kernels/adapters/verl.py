"""Advantages, policy loss and LM head for verl (0.9).

    from r4b_kernels.adapters import verl

    verl.register()              # in a module that VERL_USE_EXTERNAL_MODULES names
    verl.use_linear_logprob()    # in the actor's processes

    algorithm.adv_estimator=r4b_bimode                       # or r4b_bimode_loo
    actor_rollout_ref.actor.policy_loss.loss_mode=r4b_clip
    actor_rollout_ref.model.use_fused_kernels=True           # the head: hidden states to log-probabilities
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

The functions themselves need torch alone; ``row_weights`` turns verl's aggregation modes into policy_loss_head's rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r4b_kernels.group_advantage import group_advantage
from r4b_kernels.linear_logprob import linear_logprob


def register() -> None:
    """Add the advantage estimators "r4b_bimode" and "r4b_bimode_loo" and the policy loss "r4b_clip"."""
    from verl.trainer.ppo import core_algos

    for name, baseline in (("r4b_bimode", "union"), ("r4b_bimode_loo", "leave_one_out")):
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(functools.partial(bimode_advantage, baseline=baseline))
    core_algos.register_policy_loss("r4b_clip")(clip_policy_loss)


def bimode_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    config: Any = None,
    *,
    mode: Tensor | None = None,
    baseline: str = "union",
    epsilon: float = 1e-6,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """group_advantage with verl's arguments: advantages on the tokens, twice, since returns are the same.

    Rewards and mask are [B, C]; ``index`` holds each response's prompt, in any order. Unlike verl's GRPO, a group of
    one and a group of equal rewards give exactly 0.

    Args:
        mode: integer [B], 0 direct, 1 thinking; needed for the baseline "per_mode" alone. verl's loop does not pass it.
        config: ``norm_adv_by_std_in_grpo`` says whether to divide by the standard deviation; by default yes.
    """
    if mode is None and baseline == "per_mode":
        raise ValueError("baseline='per_mode' needs mode: give each response's mode, or use 'union'")
    rewards = token_level_rewards.sum(-1)
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(key, len(numbers)) for key in index], dtype=torch.int64)
    order = groups.argsort(stable=True).to(rewards.device)
    offsets = torch.nn.functional.pad(groups.bincount(minlength=len(numbers)).cumsum(0), (1, 0)).to(rewards.device)
    mode = torch.zeros_like(order) if mode is None else mode
    std = bool(config.get("norm_adv_by_std_in_grpo", True)) if config is not None else True
    sorted_advantage = group_advantage(
        rewards[order].float(), offsets, mode[order], baseline=baseline, std=std, eps=epsilon
    ).advantage
    advantage = torch.empty_like(sorted_advantage).index_copy_(0, order, sorted_advantage)
    tokens = advantage[:, None] * response_mask
    return tokens, tokens


def clip_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective of R-4B (Eq. 1) on [B, C]: verl's "vanilla" without its third, dual-clip branch.

    ``config`` is verl's ActorConfig. Whatever stands in masked tokens, NaN included, reaches neither loss nor gradient.
    """
    weight = row_weights(response_mask, loss_agg_mode, **config.global_batch_info)
    live, zero = weight != 0, torch.zeros_like(log_prob)
    difference = torch.where(live, log_prob - old_log_prob.detach(), zero).clamp(-20, 20)
    ratio, advantage = difference.exp(), torch.where(live, advantages, zero)
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    plain, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    policy = -torch.minimum(plain, clipped)
    if rollout_is_weights is not None:
        policy = policy * torch.where(live, rollout_is_weights, zero)
    tokens = response_mask.sum().clamp(min=1)
    metrics = {
        "actor/pg_clipfrac": ((clipped < plain) * response_mask).sum() / tokens,
        "actor/ppo_kl": -(difference.detach() * response_mask).sum() / tokens,
    }
    return (policy * weight).sum(), {name: float(value) for name, value in metrics.items()}


def row_weights(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Each token's share of the loss, float32 [B, C], in verl's aggregation modes: agg_loss(x) = sum(x * weights)."""
    mask = mask.float()
    lengths = mask.sum(-1, keepdim=True)
    if loss_agg_mode in ("token-mean", "token-sum"):
        tokens = mask.sum() if batch_num_tokens is None else batch_num_tokens
        return mask * dp_size / (tokens if loss_agg_mode == "token-mean" else 1.0)
    sequences = (lengths > 0).sum() if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-mean":
        return mask / (lengths + 1e-8) / sequences * dp_size
    if loss_agg_mode == "seq-mean-token-sum":
        return mask / sequences * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return mask / sequences * dp_size / (loss_scale_factor or mask.shape[-1])
    raise ValueError(f"loss_agg_mode={loss_agg_mode!r}: not one of verl's")


def use_linear_logprob() -> None:
    """Compute verl's fused head, hidden states to log-probabilities and entropies, with linear_logprob."""
    from verl.utils.experimental import torch_functional

    head: Any = torch_functional.FusedLinearForPPO
    head.forward = _fused_linear


def _fused_linear(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[..., H] and ids [...] -> log-probabilities and entropies [...]."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    results = linear_logprob(rows, vocab_weights, input_ids.reshape(-1).long(), temperature=float(temperature))
    logprob, entropy = (value.view(input_ids.shape) for value in results)
    return logprob, entropy

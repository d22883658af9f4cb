"""TRL's GRPO loss on policy_loss_head: LM head, loss and gradient in one op (TRL 1.16).

    from trl import GRPOConfig, GRPOTrainer
    from r4b_kernels.adapters.trl import PolicyHead

    class Trainer(PolicyHead, GRPOTrainer):
        pass

    Trainer(model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=data).train()

Loss, gradients and metrics are GRPOTrainer's for the loss types of ``LOSS_TYPES``; a setting that the head cannot
compute is refused when the trainer is made. ``grpo_loss`` is the loss alone, for other loops. On the host it is tested
with TRL's own trainer; FSDP and DeepSpeed, whose weights it gathers as TRL does, have not been run.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r4b_kernels.linear_logprob import linear_logprob
from r4b_kernels.policy_loss_head import PolicyLoss, policy_loss_head

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
_VISION = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


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


def add_policy_head(model: Any, *, float32: bool = False) -> None:
    """Let ``model(..., head_loss=f)`` return ``f(last hidden states [B, T, H], LM head [V, H])``.

    The loss is computed inside the forward because sharded weights are gathered there. Under autocast both arguments
    have its dtype, unless ``float32``.
    """
    original, config = model.forward, model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"{name}={getattr(config, name)}: the policy head has plain logits; use GRPOTrainer alone")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("the LM head has a bias, the policy head has none; use GRPOTrainer alone")

    @functools.wraps(original)  # generate() looks at the signature
    def forward(self: Any, *args: Any, head_loss: Callable[[Tensor, Tensor], Any] | None = None, **inputs: Any) -> Any:
        if head_loss is None:
            return original(*args, **inputs)
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden, weight = self.base_model(*args, **inputs).last_hidden_state, self.get_output_embeddings().weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        device, dtype = hidden.device.type, torch.float32 if float32 else hidden.dtype
        if torch.is_autocast_enabled(device) and not float32:
            dtype = torch.get_autocast_dtype(device)
        with maybe_gather_lm_head_ctx(weight), torch.autocast(device, enabled=False):
            return head_loss(hidden.to(dtype), weight.to(dtype))

    model.forward = types.MethodType(forward, model)


class PolicyHead:
    """Put it before GRPOTrainer among the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        refused = {
            "loss_type": me.loss_type not in LOSS_TYPES,
            "importance_sampling_level": me.importance_sampling_level != "token",
            "delta": me.args.delta is not None,
            "top_entropy_quantile": me.top_entropy_quantile < 1.0,
            "entropy_coef": me._entropy_bonus_enabled,
            "off_policy_mask_threshold": me.off_policy_mask_threshold is not None,
            "use_bias_correction_kl": me.beta != 0 and me.args.use_bias_correction_kl,
            "router_aux_loss_coef": me.aux_loss_enabled,
        }
        for name in (name for name, true in refused.items() if true):
            raise ValueError(f"{name}={getattr(me.args, name, True)}: not in policy_loss_head; use GRPOTrainer alone")
        model = me.accelerator.unwrap_model(me.model)
        add_policy_head(
            model.get_base_model() if hasattr(model, "get_base_model") else model, float32=me.args.cast_lm_head_to_fp32
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        me: Any = self
        mode, ids = "train" if me.model.training else "eval", inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"][:, None]
        if me.use_vllm and me.vllm_importance_sampling_correction:
            # A positive factor of the policy term alone: min(r A, clip(r) A) w = min(r Aw, clip(r) Aw).
            advantages = advantages * inputs["importance_sampling_ratio"]
        accumulated = me.current_gradient_accumulation_steps if mode == "train" else 1.0
        items = None
        if me.loss_type == "dapo":
            window = 1.0 / me.args.steps_per_generation if mode == "train" else 1.0
            items = inputs["num_items_in_batch"].clamp(min=1.0) / me.accelerator.num_processes * window
        weights = row_weights(mask, me.loss_type, max_completion_length=me.max_completion_length, num_items=items)
        loss = functools.partial(
            grpo_loss,
            ids=ids,
            advantages=advantages.expand_as(ids),
            row_weight=weights / accumulated,
            old_logprob=inputs.get("old_per_token_logps"),
            ref_logprob=inputs["ref_per_token_logps"] if me.beta else None,
            clip_low=me.epsilon_low,
            clip_high=me.epsilon_high,
            kl_coef=me.beta,
            temperature=me.temperature,
        )
        with me.accelerator.autocast():
            result = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                head_loss=lambda hidden, weight: loss(hidden[:, -ids.shape[1] - 1 : -1], weight),
                use_cache=False,
                **{name: inputs[name] for name in _VISION if inputs.get(name) is not None},
            )
        self._log_policy(mode, result, advantages, mask)
        return result.loss

    def _log_policy(self, mode: str, result: PolicyLoss, advantages: Tensor, mask: Tensor) -> None:
        """GRPOTrainer's metrics, from what the head returns."""
        me: Any = self
        low = (result.ratio < 1 - me.epsilon_low) & (advantages < 0)
        high = (result.ratio > 1 + me.epsilon_high) & (advantages > 0)
        values = {"entropy": result.entropy, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        values |= {"clip_ratio/region_mean": low | high} | ({"kl": result.kl} if me.beta else {})
        sums = torch.stack([mask.sum(), *((value * mask).sum() for value in values.values())]).float()
        tokens, *totals = me.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = me._metrics[mode]
        for name, total in zip(values, totals, strict=True):
            metrics[name].append(total / max(tokens, 1.0))
        for name, value, pick in (("low_min", low, torch.amin), ("high_max", high, torch.amax)):
            shares = me.accelerator.gather((value * mask).sum(1) / mask.sum(1))
            shares = shares[~shares.isnan()]
            metrics[f"clip_ratio/{name}"].append(pick(shares).item() if len(shares) else float("nan"))

"""TRL's GRPO on policy_loss_head, LM head, loss and gradient in one op, and on shared prompts (TRL 1.16).

    from trl import GRPOConfig, GRPOTrainer
    from r4b_kernels.adapters.trl import PolicyHead

    class Trainer(PolicyHead, GRPOTrainer):
        share_prompts = True

    Trainer(model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=data).train()

Loss, gradients and metrics are GRPOTrainer's for the loss types of ``LOSS_TYPES``; a setting that the head cannot
compute is refused when the trainer is made. It is tested with TRL's own trainer on the host; FSDP and DeepSpeed, whose
weights it gathers as TRL does, have not been run.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r4b_kernels.adapters import huggingface
from r4b_kernels.adapters.grpo import LOSS_TYPES, grpo_loss, row_weights
from r4b_kernels.adapters.padded import share_prompts
from r4b_kernels.policy_loss_head import PolicyLoss

_VISION = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


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
    """Put it before GRPOTrainer among the bases.

    Attributes:
        share_prompts: compute each prompt once for its completions in the micro-batch, under "r4b_prefix", in the loss
            and its gradient; sampling keeps the model's own attention. Text only.
    """

    share_prompts = False

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
        forward, rows = self._shared(inputs) if me.share_prompts else self._padded(inputs)
        with me.accelerator.autocast():
            result = model(**forward, head_loss=lambda h, weight: loss(h[rows], weight), use_cache=False)
        self._log_policy(mode, result, advantages, mask)
        return result.loss

    def _padded(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The model's inputs, every completion behind its own prompt, and the states that predict completions."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        images = {name: inputs[name] for name in _VISION if inputs.get(name) is not None}
        completion = slice(-inputs["completion_ids"].shape[1] - 1, -1)
        return {"input_ids": ids, "attention_mask": mask, **images}, (slice(None), completion)

    def _shared(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The same with one copy of each prompt."""
        if any(inputs.get(name) is not None for name in _VISION):
            raise ValueError("share_prompts=True packs text, the batch has images: set share_prompts=False")
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        packed = share_prompts(*(inputs[name] for name in names))
        self._attend(huggingface.PREFIX)
        stream = {"input_ids": packed.ids[None], "position_ids": packed.position_ids[None]}
        return {**stream, "prefix_layout": packed.layout}, (0, packed.rows)

    def _attend(self, name: str | None) -> None:
        """Switch the model's attention, None back to its own."""
        me: Any = self
        model = me.accelerator.unwrap_model(me.model)
        if name is not None and model.config._attn_implementation != name:
            huggingface.register()
            self._own_attention = model.config._attn_implementation
            model.set_attn_implementation(name)
        elif name is None and getattr(self, "_own_attention", None) is not None:
            model.set_attn_implementation(self._own_attention)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._attend(None)  # after the backward pass, whose recomputation needs the same attention
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        self._attend(None)
        return result

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

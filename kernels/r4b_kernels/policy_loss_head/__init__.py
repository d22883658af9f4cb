"""LM head and clipped policy-gradient loss in one op, with the gradient computed in the forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.policy_loss_head import cpu, reference
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import check_first_derivative, check_head, group_name

__all__ = ["PolicyLoss", "policy_loss_head"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("policy_loss_head", "cpu", cpu.forward, dispatch.only_on("cpu"))
dispatch.register(
    "policy_loss_head", "triton", "r4b_kernels.policy_loss_head.triton:forward", dispatch.where_triton_runs
)
dispatch.register("policy_loss_head", "reference", reference.forward)


class PolicyLoss(NamedTuple):
    """What policy_loss_head returns; float32, or float64 for float64 inputs. Only ``loss`` carries gradients.

    Attributes:
        loss: scalar, the weighted sum over rows.
        logprob: [T], log-probability of the target now, at the given temperature; 0 in masked rows.
        entropy: [T], entropy of the row's distribution in nats; 0 in masked rows.
        ratio: [T], exp(logprob - old_logprob); 1 in rows without a loss.
        kl: [T], the k3 estimate of KL(policy || reference); 0 without ref_logprob and in rows without a loss.
        clipped: bool [T], the clipped branch was the smaller one, so that the policy term has no gradient.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    row_weight: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO/GRPO (R-4B Eq. 1) on top of a linear LM head.

    With lp_t = log softmax(hidden_t @ weight.T / temperature)[target_t] and r_t = exp(lp_t - old_logprob_t):

        loss = sum_t row_weight_t * ( -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef * k3_t )
        k3_t = exp(ref_t - lp_t) - (ref_t - lp_t) - 1

    Both log-differences are clamped to [-20, 20] before the exponential, against overflow; beyond the clamp the
    gradient is 0. ``row_weight`` carries every reduction: 1/tokens for a token mean, 1/(sequences * length) for a
    sequence mean, a constant for Dr. GRPO.

    A row is masked if its target is negative, and has no loss if it is masked or its weight is 0: whatever the other
    arguments hold there (NaN and inf included) reaches neither the loss nor a gradient. Rows whose gradient is known
    to be zero (no loss; advantage 0 without KL) take no part in the backward matrix products.

    Args:
        hidden: [T, H], float32, float64, bfloat16 or float16.
        weight: [V, H] of hidden's dtype; with ``group``, this rank's shard (equal, contiguous, in rank order).
        target: int64 [T], ids in the whole vocabulary; negative masks the row.
        old_logprob: [T], log-probabilities under the policy that sampled (or that began the update).
        advantage: [T].
        row_weight: [T].
        ref_logprob: [T], log-probabilities under the reference policy; needed if ``kl_coef`` is not 0.
        clip_low: lower clip, in [0, 1].
        clip_high: upper clip, not negative.
        kl_coef: weight of the KL term, not negative.
        temperature: divides the logits; positive. Use the one the responses were sampled with.
        group: the ranks over which the vocabulary is cut; everything but ``weight`` is the same on all of them, and
            hidden's gradient is the full one, already summed over the group.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes or ranges, ``kl_coef`` without ``ref_logprob``, a
            backend that cannot serve the device, and a target beyond the vocabulary; except that the "triton" backend
            does not wait for the targets' values and gives NaN for such a row.
    """
    check_head(hidden, weight, target, temperature)
    rows = {"old_logprob": old_logprob, "advantage": advantage, "row_weight": row_weight, "ref_logprob": ref_logprob}
    for name, value in rows.items():
        if value is not None and (value.shape != target.shape or not value.is_floating_point()):
            raise ValueError(
                f"{name} must be floating-point [T] with T={target.shape[0]}, it is {value.dtype} {tuple(value.shape)}"
            )
    dispatch.check_devices("hidden", hidden.device, **rows)
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low={clip_low}: must lie in [0, 1], the ratio is clipped from below at 1 - clip_low")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high={clip_high}: must not be negative")
    if not kl_coef >= 0.0:
        raise ValueError(f"kl_coef={kl_coef}: must not be negative")
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob: give the reference's log-probabilities or kl_coef=0")
    training = torch.is_grad_enabled()
    dtype = accumulation_dtype(hidden.dtype)
    loss, *metrics, _, _ = _policy_loss_head(
        hidden,
        weight,
        target,
        *(None if value is None else value.detach().to(dtype) for value in rows.values()),
        float(clip_low),
        float(clip_high),
        float(kl_coef),
        float(temperature),
        group_name(group),
        training and hidden.requires_grad,
        training and weight.requires_grad,
        backend,
    )
    return PolicyLoss(loss, *(metric.detach() for metric in metrics))


@torch.library.custom_op("r4b_kernels::policy_loss_head", mutates_args=())
def _policy_loss_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    row_weight: Tensor,
    ref_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    temperature: float,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("policy_loss_head", hidden.device, backend, hidden)
    rows = reference.Rows(target, old_logprob, advantage, row_weight, ref_logprob)
    objective = reference.Objective(clip_low, clip_high, kl_coef, temperature)
    return implementation(hidden, weight, rows, objective, group, need_hidden, need_weight)


@_policy_loss_head.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, need_hidden, need_weight, _ = rest
    dtype, rows = accumulation_dtype(hidden.dtype), hidden.shape[0]
    return (
        hidden.new_empty((), dtype=dtype),
        *(hidden.new_empty(rows, dtype=dtype) for _ in range(4)),
        hidden.new_empty(rows, dtype=torch.bool),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, grad_hidden, grad_weight = output
    ctx.scalars, ctx.spent = inputs[7:], False
    ctx.save_for_backward(grad_hidden, grad_weight, *inputs[:7])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Scales the gradients where they lie, so that no second [V, H] is needed; another backward computes them anew."""
    nothing = (None,) * 13
    if grad_loss is None:
        return None, None, *nothing
    check_first_derivative("policy_loss_head")
    grad_hidden, grad_weight, *inputs = ctx.saved_tensors
    if ctx.spent:
        *_, grad_hidden, grad_weight = _policy_loss_head(*inputs, *ctx.scalars)
    ctx.spent = True
    hidden, weight, *_ = inputs
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return (
        _scaled(grad_hidden, grad_loss, hidden.dtype) if need_hidden else None,
        _scaled(grad_weight, grad_loss, weight.dtype) if need_weight else None,
        *nothing,
    )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, in place where the dtype stays (not while a compiler traces), else into a new tensor."""
    if type(gradient) is not Tensor:
        return (gradient * factor).to(dtype)
    if gradient.dtype == dtype:
        # By .data, so that autograd does not count this as a change of what it saved.
        return gradient.data.mul_(factor)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


_policy_loss_head.register_autograd(_backward, setup_context=_setup_context)

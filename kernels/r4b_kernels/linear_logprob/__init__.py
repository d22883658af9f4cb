"""LM head, log-softmax, gather and entropy in one op, without the [T, V] logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.linear_logprob import cpu, reference
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import check_head, group_name

__all__ = ["linear_logprob"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("linear_logprob", "cpu", cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("linear_logprob", "triton", "r4b_kernels.linear_logprob.triton:Backend", dispatch.where_triton_runs)
dispatch.register("linear_logprob", "reference", reference.Backend)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and entropy of each row's distribution under a linear LM head.

    With logits z = hidden @ weight.T / temperature: ``logprob[t] = z[t, target[t]] - logsumexp(z[t])`` and
    ``entropy[t] = -sum_v p[t, v] log p[t, v]``, p being softmax(z). Both are differentiable in hidden and weight.

    Args:
        hidden: [T, H], float32, float64, bfloat16 or float16.
        weight: [V, H] of hidden's dtype; with ``group``, this rank's shard (equal, contiguous, in rank order).
        target: int64 [T], ids in the whole vocabulary. A negative id masks the row: logprob 0, entropy 0, no gradient.
        temperature: divides the logits; positive.
        group: the ranks over which the vocabulary is cut. ``hidden`` and ``target`` are the same on all of them; both
            results are the same on all of them, and hidden's gradient is the full one, already summed over the group.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Returns:
        (logprob, entropy), both [T], float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        ValueError: naming the argument, for wrong shapes or dtypes, a temperature that is not positive, a backend that
            cannot serve the device, and a target beyond the vocabulary; except that the "triton" backend does not wait
            for the targets' values and gives NaN for such a row.
    """
    check_head(hidden, weight, target, temperature)
    logprob, entropy, _ = _linear_logprob(hidden, weight, target, float(temperature), group_name(group), backend)
    return logprob, entropy


@torch.library.custom_op("r4b_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, group: str | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.resolve("linear_logprob", hidden.device, backend, hidden).forward(
        hidden, weight, target, temperature, group
    )


@_linear_logprob.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    return hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype)


@torch.library.custom_op("r4b_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    implementation = dispatch.resolve("linear_logprob", hidden.device, backend, hidden)
    rows = (hidden, weight, target, logsumexp, entropy)
    return implementation.backward(grad_logprob, grad_entropy, *rows, temperature, group, need_hidden, need_weight)


@_linear_logprob_backward.register_fake
def _(
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, need_hidden, need_weight, _ = rest
    return hidden.new_empty(hidden.shape if need_hidden else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, ctx.temperature, ctx.group, ctx.backend = inputs
    _, entropy, logsumexp = output
    ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_logprob is None and grad_entropy is None:
        return None, None, None, None, None, None
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _linear_logprob_backward(
        grad_logprob,
        grad_entropy,
        *ctx.saved_tensors,
        ctx.temperature,
        ctx.group,
        need_hidden,
        need_weight,
        ctx.backend,
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)

"""LM head and distillation from a teacher's top K in one op, with the gradient computed in the forward pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.linear_distill import cpu, reference
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import check_first_derivative, check_head, group_name

__all__ = ["DistillLoss", "Divergence", "linear_distill"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("linear_distill", "cpu", cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("linear_distill", "triton", "r4b_kernels.linear_distill.triton:Backend", dispatch.where_triton_runs)
dispatch.register("linear_distill", "reference", reference.Backend)

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class DistillLoss(NamedTuple):
    """What linear_distill returns; float32, or float64 for float64 inputs. Only ``loss`` carries gradients.

    Attributes:
        loss: scalar, the weighted sum over rows.
        divergence: [T], in nats; 0 in dead rows, as are the next three.
        teacher_mass: [T], the teacher's probability on the row's ids, as given.
        student_mass: [T], the student's probability on the row's ids; 1 with ``tail=False``.
        entropy: [T], entropy in nats of the student's row over the vocabulary; with ``tail=False``, over the row's ids.
    """

    loss: Tensor
    divergence: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    entropy: Tensor


def linear_distill(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> DistillLoss:
    """Divergence between a teacher known on K ids per row and a student with a linear LM head.

    The student's distribution is p = softmax(hidden @ weight.T / temperature). Per row, both distributions are reduced
    to buckets, q for the student and t for the teacher: one per id and, with ``tail``, one for all other ids, which
    holds 1 - sum of the rest (for the teacher at least 2**-23, what float32 log-probabilities cannot tell from 0).
    Without ``tail`` both are renormalised over the row's ids. Then

        loss = sum_t row_weight_t * divergence_t
        forward_kl: KL(t || q)      reverse_kl: KL(q || t)
        jsd: beta KL(t || m) + (1 - beta) KL(q || m), m = beta t + (1 - beta) q   (GKD, arXiv 2306.13649)

    As in GKD, jsd with ``beta`` 0 is the forward and with 1 the reverse KL. ``row_weight`` carries every reduction, and
    the factor temperature**2 where that is wanted.

    A row is dead if its weight is 0 or all of its ids are negative: whatever else it holds (NaN and inf included)
    reaches neither the loss nor a gradient, and it takes part in no matrix product.

    Args:
        hidden: [T, H], float32, float64, bfloat16 or float16.
        weight: [V, H] of hidden's dtype; with ``group``, this rank's shard (equal, contiguous, in rank order).
        teacher_ids: int64 [T, K], K <= V, ids in the whole vocabulary, no id twice in a row; negative: an unused slot,
            whose log-probability may be anything.
        teacher_logprobs: [T, K], the teacher's log-probabilities of those ids at the same temperature. -inf is allowed
            but for reverse_kl, which is infinite there. Without ``tail``, a constant per row does not matter.
        row_weight: [T].
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of jsd's mixture, in [0, 1].
        temperature: divides the student's logits; positive.
        tail: whether the ids not listed make one more bucket. A row that lists the whole vocabulary has none.
        group: the ranks over which the vocabulary is cut; everything but ``weight`` is the same on all of them, and
            hidden's gradient is the full one, already summed over the group.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes, devices or ranges, a backend that cannot serve the
            device, and on the CPU, naming the row, for ids beyond the vocabulary or twice in a row and for
            log-probabilities that are none.
        NotImplementedError: where its backward is asked for a graph of its own (``create_graph=True``).
    """
    _check(hidden, weight, teacher_ids, teacher_logprobs, row_weight, temperature, group)
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence={divergence!r}: must be one of {', '.join(get_args(Divergence))}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: must lie in [0, 1], it is the teacher's share of jsd's mixture")
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    training = torch.is_grad_enabled()
    loss, *metrics, _, _ = _linear_distill(
        hidden,
        weight,
        teacher_ids,
        teacher_logprobs.detach(),
        row_weight.detach().to(accumulation_dtype(hidden.dtype)),
        divergence,
        float(beta),
        float(temperature),
        bool(tail),
        group_name(group),
        training and hidden.requires_grad,
        training and weight.requires_grad,
        backend,
    )
    return DistillLoss(loss, *(metric.detach() for metric in metrics))


def _check(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> None:
    rows = hidden.shape[0] if hidden.dim() else 0
    if teacher_ids.dtype != torch.int64 or teacher_ids.dim() != 2 or teacher_ids.shape[0] != rows:
        raise ValueError(
            f"teacher_ids must be int64 [T, K] with T={rows}, it is {teacher_ids.dtype} {tuple(teacher_ids.shape)}"
        )
    slots = teacher_ids.shape[1]
    if slots == 0:
        raise ValueError("teacher_ids has K=0 slots per row: give at least one (a row of negative ids has no loss)")
    check_head(hidden, weight, teacher_ids[:, 0], temperature)
    vocabulary = weight.shape[0] * (1 if group is None else group.size())
    if slots > vocabulary:
        raise ValueError(f"teacher_ids has K={slots} slots per row, the vocabulary has {vocabulary} rows: K <= V")
    if teacher_logprobs.shape != teacher_ids.shape or not teacher_logprobs.is_floating_point():
        raise ValueError(
            f"teacher_logprobs must be floating-point [T, K] = {tuple(teacher_ids.shape)}, "
            f"it is {teacher_logprobs.dtype} {tuple(teacher_logprobs.shape)}"
        )
    if row_weight.shape != (rows,) or not row_weight.is_floating_point():
        raise ValueError(
            f"row_weight must be floating-point [T] with T={rows}, it is {row_weight.dtype} {tuple(row_weight.shape)}"
        )
    dispatch.check_devices(
        "hidden", hidden.device, teacher_ids=teacher_ids, teacher_logprobs=teacher_logprobs, row_weight=row_weight
    )


@torch.library.custom_op("r4b_kernels::linear_distill", mutates_args=())
def _linear_distill(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    tail: bool,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("linear_distill", hidden.device, backend, hidden, teacher_ids)
    rows = reference.Rows(teacher_ids, teacher_logprobs, row_weight)
    objective = reference.Objective(divergence, beta, temperature, tail)
    return implementation.forward(hidden, weight, rows, objective, group, need_hidden, need_weight)


@_linear_distill.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, need_hidden, need_weight, _ = rest
    dtype, rows = accumulation_dtype(hidden.dtype), hidden.shape[0]
    return (
        hidden.new_empty((), dtype=dtype),
        *(hidden.new_empty(rows, dtype=dtype) for _ in range(4)),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, grad_hidden, grad_weight = output
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if grad_loss is None:
        return None, None, *nothing
    check_first_derivative("linear_distill")
    grad_hidden, grad_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return (
        (grad_hidden * grad_loss).to(grad_hidden.dtype) if need_hidden else None,
        (grad_weight * grad_loss).to(ctx.dtype) if need_weight else None,
        *nothing,
    )


_linear_distill.register_autograd(_backward, setup_context=_setup_context)

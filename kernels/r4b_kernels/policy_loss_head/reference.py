"""The definition of policy_loss_head, in float32, or float64 when given float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r4b_kernels.linear_logprob.reference import gathered_logits, gradients_of_logits, logprob_and_entropy
from r4b_kernels.vocabulary import check_target_range, group_of

# Log-differences are clamped here before the exponential; exp(20) = 4.9e8 is far beyond any ratio worth learning from.
LOG_DIFFERENCE_LIMIT = 20.0


class Rows(NamedTuple):
    """Per-row data of the loss, each [T]."""

    target: Tensor
    old_logprob: Tensor
    advantage: Tensor
    row_weight: Tensor
    ref_logprob: Tensor | None

    def at(self, index: slice | Tensor) -> Rows:
        ref_logprob = None if self.ref_logprob is None else self.ref_logprob[index]
        rows = self.target, self.old_logprob, self.advantage, self.row_weight
        target, old_logprob, advantage, row_weight = (value[index] for value in rows)
        return Rows(target, old_logprob, advantage, row_weight, ref_logprob)

    def contiguous(self) -> Rows:
        ref_logprob = None if self.ref_logprob is None else self.ref_logprob.contiguous()
        rows = self.target, self.old_logprob, self.advantage, self.row_weight
        target, old_logprob, advantage, row_weight = (value.contiguous() for value in rows)
        return Rows(target, old_logprob, advantage, row_weight, ref_logprob)

    @property
    def has_loss(self) -> Tensor:
        return (self.target >= 0) & (self.row_weight != 0)


class Objective(NamedTuple):
    """The scalars of the loss."""

    clip_low: float
    clip_high: float
    kl_coef: float
    temperature: float


class Terms(NamedTuple):
    """Per-row results, each [T]; ``loss`` is the row's share of the loss, its weight included."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


def row_terms(logprob: Tensor, rows: Rows, objective: Objective) -> Terms:
    """The loss row by row; differentiable in ``logprob`` by autograd."""
    has_loss = rows.has_loss
    zero = torch.zeros_like(logprob)

    def clean(value: Tensor) -> Tensor:
        return torch.where(has_loss, value, zero)

    advantage = clean(rows.advantage)
    ratio = clean(logprob - rows.old_logprob).clamp(-LOG_DIFFERENCE_LIMIT, LOG_DIFFERENCE_LIMIT).exp()
    free = ratio * advantage
    bound = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage
    kl = zero
    if rows.ref_logprob is not None:
        gap = clean(rows.ref_logprob - logprob).clamp(-LOG_DIFFERENCE_LIMIT, LOG_DIFFERENCE_LIMIT)
        kl = torch.expm1(gap) - gap
    loss = clean(rows.row_weight) * (objective.kl_coef * kl - torch.minimum(free, bound))
    return Terms(loss, ratio, kl, bound < free)


def row_gradient(logprob: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """[T], the derivative of each row's loss by its logprob, written out."""
    has_loss = rows.has_loss
    _, ratio, _, clipped = row_terms(logprob, rows, objective)
    inside = (logprob - rows.old_logprob).abs() <= LOG_DIFFERENCE_LIMIT
    gradient = torch.where(inside & ~clipped, -rows.advantage * ratio, 0.0)
    if rows.ref_logprob is not None and objective.kl_coef:
        gap = rows.ref_logprob - logprob
        gradient = gradient - objective.kl_coef * torch.where(gap.abs() <= LOG_DIFFERENCE_LIMIT, torch.expm1(gap), 0.0)
    return torch.where(has_loss, rows.row_weight * gradient, 0.0)


def forward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    objective: Objective,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """(loss, logprob, entropy, ratio, kl, clipped, d loss / d hidden, d loss / d weight)."""
    check_target_range(rows.target, weight.shape[0], group_of(group))
    z = gathered_logits(hidden, weight, objective.temperature, group_of(group))
    logprob, entropy = logprob_and_entropy(z, rows.target)
    terms = row_terms(logprob, rows, objective)
    one_hot = torch.zeros_like(z).scatter_(1, rows.target.clamp_min(0)[:, None], 1.0)
    grad_z = row_gradient(logprob, rows, objective)[:, None] * (one_hot - torch.softmax(z, dim=-1))
    untouched = rows._replace(target=torch.where(rows.has_loss, rows.target, -1)).target
    grad_hidden, grad_weight = gradients_of_logits(
        grad_z, hidden, weight, untouched, objective.temperature, group, need_hidden, need_weight
    )
    kl = terms.kl.clone()
    return (
        terms.loss.sum(), logprob, entropy, terms.ratio, kl, terms.clipped, grad_hidden, grad_weight.to(z.dtype),
    )  # fmt: skip

"""The definition of linear_distill: dense logits, in float32, or float64 when given float64.

Also the mathematics of a row, which the cpu backend shares: buckets, divergences and their slopes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r4b_kernels.linear_logprob.reference import gathered_logits
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import group_of, shard_start, sum_over

# The least mass of the teacher's tail: the spacing of float32 at 1, below which a sum of K float32 probabilities says
# nothing about what is left.
TAIL_FLOOR = 2.0**-23
# Log-probabilities rounded to bfloat16 may sum to a little over 1; more than this is a mistake.
MASS_LIMIT = 1.05


class Rows(NamedTuple):
    """Per-row data of the loss: ids and log-probabilities [T, K], weight [T]."""

    ids: Tensor
    logprobs: Tensor
    row_weight: Tensor

    def at(self, index: slice | Tensor) -> Rows:
        return Rows(self.ids[index], self.logprobs[index], self.row_weight[index])

    @property
    def live(self) -> Tensor:
        return (self.row_weight != 0) & (self.ids >= 0).any(1)


class Objective(NamedTuple):
    """The loss, but for its rows. ``beta`` lies strictly between 0 and 1 where divergence is jsd."""

    divergence: str
    beta: float
    temperature: float
    tail: bool


class Terms(NamedTuple):
    """Per-row results, each [T] but for ``slope`` [T, B], the derivative of the divergence by each bucket's logit."""

    divergence: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    entropy: Tensor
    slope: Tensor


def row_terms(
    listed: Tensor, rest: tuple[Tensor, Tensor] | None, rows: Rows, vocabulary: int, objective: Objective
) -> Terms:
    """What live rows come to, given what their logits reduce to.

    Computed in float64: it is little, and so rounding enters by the logits alone, each with its slope as the factor.

    Args:
        listed: [T, K], the student's logits of the ids; anything in unused slots.
        rest: (logsumexp of the student's other logits, entropy of the softmax over them alone), [T] each, with a tail.
        rows: [T, K] and [T].
        vocabulary: number of ids.
    """
    log_t, used, teacher_mass = teacher_buckets(rows, vocabulary, objective.tail)
    logits = listed if rest is None else torch.cat([listed, rest[0][:, None]], dim=1)
    log_q = torch.log_softmax(logits.double().masked_fill(~used, -torch.inf), dim=1)
    value, slope = divergence_and_slope(log_q, log_t, used, objective)
    q = log_q.exp()
    entropy = -_weighted(q, log_q).sum(1)
    if rest is not None:
        entropy = entropy + _weighted(q[:, -1], rest[1])  # the chain rule of entropy
    student_mass = q[:, : rows.ids.shape[1]].sum(1)
    return Terms(*(x.to(listed.dtype) for x in (value, teacher_mass, student_mass, entropy, slope)))


def teacher_buckets(rows: Rows, vocabulary: int, tail: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log t [T, B], which buckets are in use [T, B], mass on the ids [T]); float64."""
    used = rows.ids >= 0
    log_t = rows.logprobs.double().masked_fill(~used, -torch.inf)
    mass = log_t.exp().sum(1)
    if not tail:
        return torch.log_softmax(log_t, dim=1), used, mass
    others = used.sum(1, keepdim=True) < vocabulary
    left = (1 - mass[:, None]).clamp_min(TAIL_FLOOR).masked_fill(~others, 0.0)
    log_t = torch.cat([log_t, left.log()], dim=1) - (mass[:, None] + left).log()
    return log_t, torch.cat([used, others], dim=1), mass


def divergence_and_slope(log_q: Tensor, log_t: Tensor, used: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(divergence [T], its derivative by the logits whose log-softmax is log_q [T, B])."""
    q, t = log_q.exp(), log_t.exp()
    log_q, log_t = log_q.masked_fill(~used, 0.0), log_t.masked_fill(~used, 0.0)
    if objective.divergence == "forward_kl":
        return _weighted(t, log_t - log_q).sum(1), q - t
    if objective.divergence == "reverse_kl":
        log_ratio = log_q - log_t
        value = _weighted(q, log_ratio).sum(1)
        return value, _weighted(q, log_ratio - value[:, None])
    beta, share = objective.beta, 1 - objective.beta
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_t + math.log(beta))
    log_ratio = log_q - log_m
    from_student = _weighted(q, log_ratio).sum(1)
    value = beta * _weighted(t, log_t - log_m).sum(1) + share * from_student
    return value, share * _weighted(q, log_ratio - from_student[:, None])


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0, whatever x is."""
    return p * torch.where(p == 0, 0.0, x)


def check_rows(rows: Rows, vocabulary: int, objective: Objective) -> None:
    """Raise a ValueError that names a live row with impossible contents. Reads the values: for the host."""
    where = rows.live.nonzero().squeeze(1)
    ids, logprobs, _ = rows.at(where)

    def refuse(bad: Tensor, what: str) -> None:
        if bool(bad.any()):
            raise ValueError(what.format(row=int(where[bad.nonzero()[0, 0]])))

    refuse(
        (ids >= vocabulary).any(1),
        f"teacher_ids has an id beyond the vocabulary of {vocabulary} in row {{row}}: fill unused slots with -1",
    )
    ordered = ids.sort(1).values
    refuse(
        ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1),
        "teacher_ids has an id twice in row {row}: merge the two or fill one slot with -1",
    )
    used = logprobs.double().masked_fill(ids < 0, -torch.inf)
    refuse(
        ~(used.exp().sum(1) <= MASS_LIMIT) if objective.tail else ~torch.isfinite(used.logsumexp(1)),
        "teacher_logprobs are no log-probabilities in row {row}: they must not be NaN, nor all -inf without tail, "
        "nor with tail sum to a mass above 1",
    )
    if objective.divergence == "reverse_kl":
        refuse(
            ((ids >= 0) & (used == -torch.inf)).any(1),
            "teacher_logprobs has -inf in row {row}, where reverse_kl is infinite: give a finite one, or -1 as its id",
        )


def forward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    objective: Objective,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """(loss, divergence, teacher mass, student mass, entropy, d loss / d hidden, d loss / d weight)."""
    ranks = group_of(group)
    vocabulary = weight.shape[0] * (1 if ranks is None else ranks.size())
    check_rows(rows, vocabulary, objective)
    live = rows.live.nonzero().squeeze(1)
    rows, live_hidden = rows.at(live), hidden[live]
    z = gathered_logits(live_hidden, weight, objective.temperature, ranks)
    used = rows.ids >= 0
    where = (used.nonzero()[:, 0], rows.ids[used])
    others = torch.ones_like(z, dtype=torch.bool).index_put_(where, torch.tensor(False, device=z.device))
    z_rest = z.masked_fill(~others, -torch.inf)
    rest = torch.logsumexp(z_rest, dim=1)
    p_rest = torch.where(others, (z_rest - rest[:, None]).exp(), 0.0)
    rest_entropy = -torch.where(others, p_rest * (z_rest - rest[:, None]), 0.0).sum(1)
    listed = z.gather(1, rows.ids.clamp_min(0))
    terms = row_terms(listed, (rest, rest_entropy) if objective.tail else None, rows, vocabulary, objective)
    slope = terms.slope * rows.row_weight[:, None]
    grad_z = p_rest * slope[:, -1:] if objective.tail else torch.zeros_like(z)
    grad_z.index_put_(where, slope[:, : used.shape[1]][used])
    start = shard_start(weight.shape[0], ranks)
    grad_z = grad_z[:, start : start + weight.shape[0]] / objective.temperature

    dtype = accumulation_dtype(hidden.dtype)
    full = [torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in terms[:4]]
    divergence, *metrics = (out.index_copy_(0, live, value) for out, value in zip(full, terms[:4], strict=True))
    grad_hidden, grad_weight = hidden.new_empty(0), hidden.new_empty(0, dtype=dtype)
    if need_hidden:
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        grad_hidden.index_copy_(0, live, sum_over(grad_z @ weight.to(dtype), ranks))
        grad_hidden = grad_hidden.to(hidden.dtype)
    if need_weight:
        grad_weight = grad_z.T @ live_hidden.to(dtype)
    loss = (rows.row_weight * terms.divergence).sum()
    return loss, divergence, *metrics, grad_hidden, grad_weight


class Backend:
    """The reference backend."""

    forward = staticmethod(forward)

"""The clipped policy loss, spelled out: the truth beside the fused head, and the form for sequence-level ratios.

Shapes: R loss rows (tokens), N responses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


class PolicyTerms(NamedTuple):
    """loss scalar; per row [R]: ratio, kl (k3), clipped (bool)."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    row_weight: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    log_ratio: Tensor | None = None,
) -> PolicyTerms:
    """Sum over rows of weight * (-min(r A, clip(r) A) + kl_coef * k3), R-4B Eq. 1 with the ratio of GRPO.

    Args:
        logprob: [R], of the policy, differentiable.
        old_logprob: [R], of the policy that drew the tokens.
        advantage: [R], the response's advantage at each of its tokens.
        row_weight: [R], carries the reduction and any emphasis on the decision token.
        ref_logprob: [R], of the reference policy, for the k3 estimate exp(d) - d - 1 with d = ref - logprob.
        log_ratio: [R], takes the place of logprob - old_logprob (see `sequence_log_ratio`).
    """
    log_ratio = logprob - old_logprob if log_ratio is None else log_ratio
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantage
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    kl = torch.zeros_like(logprob)
    if ref_logprob is not None:
        difference = (ref_logprob - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = difference.exp() - difference - 1
    per_row = -torch.minimum(unclipped, bounded) + kl_coef * kl
    loss = torch.where(row_weight != 0, row_weight * per_row, torch.zeros_like(per_row)).sum()
    return PolicyTerms(loss, ratio.detach(), kl.detach(), (bounded < unclipped).detach())


def sequence_log_ratio(
    logprob: Tensor,
    old_logprob: Tensor,
    sequence: Tensor,
    counted: Tensor,
    num_sequences: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """GSPO's log-ratio at every row [R]: the mean of logprob - old_logprob over the counted rows of its response.

    Args:
        sequence: int64 [R], the row's response.
        counted: bool [R], rows that take part in the mean.
        num_sequences: N.
        group: ranks over which a response's rows are spread (context parallelism).
    """
    difference = torch.where(counted, logprob - old_logprob, torch.zeros_like(logprob))
    sums = logprob.new_zeros(num_sequences).index_add(0, sequence, difference)
    counts = logprob.new_zeros(num_sequences).index_add(0, sequence, counted.to(logprob.dtype))
    if group is not None and group.size() > 1:
        sums = _SumOverRanks.apply(sums, group)
        torch.distributed.all_reduce(counts, group=group)
    return (sums / counts.clamp(min=1))[sequence]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is one too: every rank's loss depends on every rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class RowWeights(NamedTuple):
    """Per row [sum of lengths]: its weight in the loss, and its share of what the loss is divided by."""

    weight: Tensor
    share: Tensor


def response_row_weights(
    lengths: Tensor, decision_weight: float, forced: Tensor, include_forced: bool, reduction: str, budget: int
) -> RowWeights:
    """Weights of the rows of several responses, laid end to end; loss = sum(weight * row loss) / sum(share).

    Weights need nothing but the response itself, so they are the same however a batch is cut over ranks.

    Args:
        lengths: int64 [N], tokens of each response.
        decision_weight: multiplies the first token's loss.
        forced: int64 [N], how many leading tokens were forced.
        include_forced: False takes forced tokens out of the loss.
        reduction: "token_mean" over all rows that carry loss; "sequence_mean" over each response's, then over
            responses (GRPO); "constant" divides by the budget and the number of responses (Dr. GRPO).
        budget: the most tokens a response may have.

    Raises:
        ValueError: if ``reduction`` is none of the three.
    """
    if reduction not in ("token_mean", "sequence_mean", "constant"):
        raise ValueError(f"reduction={reduction!r}: there are token_mean, sequence_mean and constant")
    count = len(lengths)
    first = lengths.cumsum(0) - lengths
    sequence = torch.repeat_interleave(torch.arange(count), lengths)
    place = torch.arange(len(sequence)) - first[sequence]
    carries = torch.ones(len(sequence)) if include_forced else (place >= forced[sequence]).float()
    emphasis = carries * torch.where(place == 0, decision_weight, 1.0)
    if reduction == "token_mean":
        return RowWeights(emphasis, carries)
    per_sequence = torch.zeros(count).index_add(0, sequence, carries).clamp(min=1)[sequence]
    divisor = per_sequence if reduction == "sequence_mean" else torch.full_like(per_sequence, float(budget))
    return RowWeights(emphasis / divisor, carries / per_sequence)

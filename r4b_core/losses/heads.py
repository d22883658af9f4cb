"""From a model's loss rows to a loss: what `Learner.step` calls on the last pipeline stage.

A head returns this rank's share of (weighted loss sum, denominator, sums to report); the learner adds the shares of all
micro-batches and ranks and divides once. Shapes: R loss rows of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r4b_core.config.recipe import BpoConfig
from r4b_core.data.batch import LossRows, PackedBatch
from r4b_core.losses.policy import policy_loss, sequence_log_ratio
from r4b_core.models.r4b.model import R4BModel
from r4b_core.models.streams import context_chunk
from r4b_kernels import linear_logprob, policy_loss_head

HeadOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def rows_of(model: R4BModel, batch: PackedBatch) -> LossRows:
    """The rows whose hidden states `R4BModel.forward` returned on this rank."""
    return batch.rows(*context_chunk(batch.num_tokens, model.cp_group))


def sft_head(model: R4BModel, batch: PackedBatch, hidden: Tensor) -> HeadOutput:
    """Negative log-likelihood of the targets, a mean over the rows that carry loss."""
    rows = rows_of(model, batch)
    logprob, entropy = linear_logprob(hidden, model.head_weight(), rows.target, group=model.head_group())
    loss = -(rows.weight * logprob).sum()
    counted = (rows.weight != 0).float()
    return loss, counted.sum(), {"entropy": (counted * entropy.detach()).sum(), "rows": counted.sum()}


@dataclass(frozen=True)
class PolicyHead:
    """BPO and its relatives: the fused head for token ratios, the spelled-out loss for sequence ratios."""

    config: BpoConfig

    def __call__(self, model: R4BModel, batch: PackedBatch, hidden: Tensor) -> HeadOutput:
        rows = rows_of(model, batch)
        if self.config.importance == "sequence":
            loss, entropy, ratio, kl, clipped = self._sequence(model, batch, rows, hidden)
        else:
            fused = policy_loss_head(
                hidden,
                model.head_weight(),
                rows.target,
                rows.data["old_logprob"],
                rows.data["advantage"],
                rows.weight,
                ref_logprob=rows.data.get("ref_logprob"),
                clip_low=self.config.clip_low,
                clip_high=self.config.clip_high,
                kl_coef=self.config.kl_coef,
                temperature=self.config.temperature,
                group=model.head_group(),
            )
            loss, entropy, ratio, kl, clipped = fused.loss, fused.entropy, fused.ratio, fused.kl, fused.clipped
        counted = (rows.weight != 0).float()
        sums = {"entropy": entropy, "ratio": ratio, "kl": kl, "clipped": clipped.float()}
        metrics = {name: (counted * column.detach()).sum() for name, column in sums.items()}
        # In float64 the sum is the same however the rows are cut into batches.
        return loss, rows.data["share"].sum(dtype=torch.float64), {**metrics, "rows": counted.sum()}

    def _sequence(self, model: R4BModel, batch: PackedBatch, rows: LossRows, hidden: Tensor) -> tuple[Tensor, ...]:
        logprob, entropy = linear_logprob(
            hidden, model.head_weight(), rows.target, temperature=self.config.temperature, group=model.head_group()
        )
        old = rows.data["old_logprob"]
        log_ratio = sequence_log_ratio(
            logprob, old, rows.sequence, rows.weight != 0, batch.num_sequences, model.cp_group
        )
        terms = policy_loss(
            logprob,
            old,
            rows.data["advantage"],
            rows.weight,
            ref_logprob=rows.data.get("ref_logprob"),
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            kl_coef=self.config.kl_coef,
            log_ratio=log_ratio,
        )
        return terms.loss, entropy, terms.ratio, terms.kl, terms.clipped


def row_logprobs(model: R4BModel, batch: PackedBatch, hidden: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [R of the whole batch], zero in rows of other context-parallel ranks (their sum is whole)."""
    rows = rows_of(model, batch)
    logprob, _ = linear_logprob(
        hidden, model.head_weight(), rows.target, temperature=temperature, group=model.head_group()
    )
    start, stop = context_chunk(batch.num_tokens, model.cp_group)
    mine = (batch.row_source >= start) & (batch.row_source < stop)
    return torch.zeros(batch.num_rows, dtype=logprob.dtype, device=logprob.device).masked_scatter(mine, logprob)

"""From a model's loss rows to a loss: what `Learner.step` calls on the last pipeline stage.

A head returns this rank's share of (weighted loss sum, denominator, sums to report); the learner adds the shares of all
micro-batches and ranks and divides once. Shapes: R loss rows of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r4b_core.config.recipe import BpoConfig, DistillConfig
from r4b_core.data.batch import LossRows, PackedBatch
from r4b_core.losses.policy import policy_loss, sequence_log_ratio
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.streams import context_chunk
from r4b_kernels import linear_distill, linear_logprob, policy_loss_head

TOPK_ROWS = 1024
HeadOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def rows_of(model: DecoderModel, batch: PackedBatch) -> LossRows:
    """The rows whose hidden states `DecoderModel.forward` returned on this rank."""
    return batch.rows(*context_chunk(batch.num_tokens, model.cp_group))


def sft_head(model: DecoderModel, batch: PackedBatch, hidden: Tensor) -> HeadOutput:
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

    def __call__(self, model: DecoderModel, batch: PackedBatch, hidden: Tensor) -> HeadOutput:
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

    def _sequence(self, model: DecoderModel, batch: PackedBatch, rows: LossRows, hidden: Tensor) -> tuple[Tensor, ...]:
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


@dataclass(frozen=True)
class DistillHead:
    """SFT with a teacher: (1 - a) times the negative log-likelihood plus a temperature^2 times the divergence.

    The columns ``teacher_ids`` (int64, -1 in unused slots) and ``teacher_logprobs`` [R, K] hold the teacher's most
    probable tokens. Rows without a teacher are SFT alone (a = 0); elsewhere a is ``logit_weight``.
    """

    config: DistillConfig

    def __call__(self, model: DecoderModel, batch: PackedBatch, hidden: Tensor) -> HeadOutput:
        config, rows = self.config, rows_of(model, batch)
        ids = rows.data["teacher_ids"]
        taught = (ids >= 0).any(1)
        share = config.logit_weight * taught
        logprob, entropy = linear_logprob(hidden, model.head_weight(), rows.target, group=model.head_group())
        distilled = linear_distill(
            hidden,
            model.head_weight(),
            ids,
            rows.data["teacher_logprobs"],
            rows.weight * share * config.temperature**2,
            divergence=config.divergence,
            beta=config.beta,
            temperature=config.temperature,
            group=model.head_group(),
        )
        loss = distilled.loss - (rows.weight * (1 - share) * logprob).sum()
        counted = (rows.weight != 0).float()
        sums = {
            "entropy": entropy,
            "nll": -logprob,
            "distill/divergence": distilled.divergence,
            "distill/teacher_mass": distilled.teacher_mass,
            "distill/taught": taught,
        }
        metrics = {name: (counted * column.detach()).sum() for name, column in sums.items()}
        return loss, counted.sum(), {**metrics, "rows": counted.sum()}


def row_topk(model: DecoderModel, batch: PackedBatch, hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, ...]:
    """The k most probable tokens of every row of the whole batch, and their log-probabilities; [R, k] each.

    Rows of other context-parallel ranks are zeros: the sum over the ranks is whole. Logits exist for `TOPK_ROWS` rows
    at a time. With a vocabulary cut over ranks, each finds its own k and the best of all are taken.
    """
    weight, group = model.head_weight(), model.head_group()
    k = min(k, weight.shape[0] * (1 if group is None else group.size()))
    found = [_topk(part, weight, k, temperature, group) for part in hidden.split(TOPK_ROWS)]
    start, stop = context_chunk(batch.num_tokens, model.cp_group)
    mine = (batch.row_source >= start) & (batch.row_source < stop)
    ids = torch.zeros(batch.num_rows, k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.zeros(batch.num_rows, k, device=hidden.device)
    if found:
        ids[mine], logprobs[mine] = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, logprobs


def _topk(
    hidden: Tensor, weight: Tensor, k: int, temperature: float, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) [r, k], the most probable first; the same on every rank of the group."""
    logits = (hidden @ weight.T).float() / temperature
    values, ids = logits.topk(min(k, logits.shape[1]), dim=1)
    total = logits.logsumexp(1)
    if group is not None:
        shards = [torch.empty_like(values) for _ in range(group.size())]
        owners = [torch.empty_like(ids) for _ in shards]
        totals = [torch.empty_like(total) for _ in shards]
        torch.distributed.all_gather(shards, values, group=group)
        torch.distributed.all_gather(owners, ids + group.rank() * weight.shape[0], group=group)
        torch.distributed.all_gather(totals, total, group=group)
        values, best = torch.cat(shards, 1).topk(k, dim=1)
        ids = torch.cat(owners, 1).gather(1, best)
        total = torch.stack(totals).logsumexp(0)
    return ids, values - total[:, None]


def row_logprobs(model: DecoderModel, batch: PackedBatch, hidden: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [R of the whole batch], zero in rows of other context-parallel ranks (their sum is whole)."""
    rows = rows_of(model, batch)
    logprob, _ = linear_logprob(
        hidden, model.head_weight(), rows.target, temperature=temperature, group=model.head_group()
    )
    start, stop = context_chunk(batch.num_tokens, model.cp_group)
    mine = (batch.row_source >= start) & (batch.row_source < stop)
    return torch.zeros(batch.num_rows, dtype=logprob.dtype, device=logprob.device).masked_scatter(mine, logprob)

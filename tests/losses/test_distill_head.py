"""The head of distillation against the formula written out on dense logits, and the teacher's top k against a sort."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import DistillConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.losses import heads
from r4b_core.losses.heads import DistillHead, row_topk, sft_head
from r4b_kernels.layout import PrefixLayout

ROWS, HIDDEN, VOCABULARY = 13, 8, 29


def model() -> Any:
    torch.manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(head_weight=lambda: weight, head_group=lambda: None, cp_group=alone)


def batch(taught: Tensor | None = None, k: int = 4) -> PackedBatch:
    """Rows with weights 1, 0 and 2, and a teacher's k tokens, of which some slots and rows are unused."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    logprobs, ids = logits.log_softmax(1).topk(k)
    ids[3, 2:] = -1
    if taught is not None:
        ids[~taught] = -1
    weight = torch.tensor([1.0, 0.0, 2.0]).repeat(5)[:ROWS]
    return PackedBatch(
        tokens=torch.zeros(ROWS, dtype=torch.int64),
        position_ids=torch.zeros(3, ROWS, dtype=torch.int64),
        layout=PrefixLayout.from_lengths([ROWS], [-1]),
        row_source=torch.arange(ROWS),
        row_target=torch.randint(0, VOCABULARY, (ROWS,), generator=generator),
        row_weight=weight,
        row_sequence=torch.zeros(ROWS, dtype=torch.int64),
        patches=torch.zeros(0, 1),
        image_grid=torch.zeros(0, 3, dtype=torch.int64),
        vision_index=torch.full((ROWS,), -1),
        num_sequences=1,
        row_data={"teacher_ids": ids, "teacher_logprobs": logprobs},
    )


def hidden() -> Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def written_out(stage: DistillConfig, made: PackedBatch, x: Tensor, weight: Tensor) -> Tensor:
    """Row by row on dense logits; forward KL with a bucket for all that is not listed."""
    total = x.new_zeros(())
    for row in range(ROWS):
        logits = x[row] @ weight.T
        nll = -logits.log_softmax(0)[made.row_target[row]]
        used = made.row_data["teacher_ids"][row] >= 0
        ids, t = made.row_data["teacher_ids"][row][used], made.row_data["teacher_logprobs"][row][used].exp()
        share = stage.logit_weight if len(ids) else 0.0
        divergence = x.new_zeros(())
        if len(ids):
            p = (logits / stage.temperature).softmax(0)[ids]
            t, p = torch.cat([t, 1 - t.sum(0, keepdim=True)]), torch.cat([p, 1 - p.sum(0, keepdim=True)])
            divergence = (t * (t.log() - p.log())).sum()
        loss = (1 - share) * nll + share * stage.temperature**2 * divergence
        total = total + made.row_weight[row] * loss
    return total


@pytest.mark.parametrize("weight,temperature", [(1.0, 1.0), (0.3, 1.0), (0.6, 2.5)])
def test_the_loss_and_its_gradients(weight: float, temperature: float) -> None:
    stage = DistillConfig(logit_weight=weight, temperature=temperature)
    taught = torch.arange(ROWS) % 4 != 1
    mine, theirs, made = hidden(), hidden(), batch(taught)
    student, oracle = model(), model()
    loss, denominator, metrics = DistillHead(stage)(student, made, mine)
    expected = written_out(stage, made, theirs, oracle.head_weight())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(student.head_weight().grad, oracle.head_weight().grad)
    counted = made.row_weight != 0
    assert denominator == metrics["rows"] == counted.sum()
    assert metrics["distill/taught"] == (counted & taught).sum()


def test_without_a_teacher_it_is_sft() -> None:
    nobody = batch(torch.zeros(ROWS, dtype=torch.bool))
    loss, denominator, metrics = DistillHead(DistillConfig(logit_weight=0.7))(model(), nobody, hidden())
    plain, plain_denominator, _ = sft_head(model(), nobody, hidden())
    torch.testing.assert_close(loss, plain)
    assert denominator == plain_denominator and metrics["distill/taught"] == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("rows_at_once", [1, 5, 1024])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    divergence: Any, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "TOPK_ROWS", rows_at_once)
    stage = DistillConfig(logit_weight=1, divergence=divergence, temperature=1.7)
    made, x, same = batch(), hidden(), model()
    with torch.no_grad():
        ids, logprobs = row_topk(same, made, x, 5, stage.temperature)
    expected = ((x @ same.head_weight().T) / stage.temperature).log_softmax(1).sort(dim=1, descending=True)
    assert torch.equal(ids, expected.indices[:, :5])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :5].detach(), rtol=0, atol=1e-5)
    made.row_data = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    loss, _, metrics = DistillHead(stage)(same, made, x)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and x.grad is not None and x.grad.abs().max() < 1e-4
    assert 0.3 < metrics["distill/teacher_mass"] / metrics["rows"] < 1


def test_no_more_tokens_are_asked_for_than_there_are() -> None:
    ids, _ = row_topk(model(), batch(), hidden(), 64, 1.0)
    assert ids.shape == (ROWS, VOCABULARY)

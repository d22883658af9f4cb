from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from r4b_core.parallel.learner import TrainingDiverged
from r4b_core.parallel.runtime import Runtime
from tests.parallel.harness import Layout, Optim, gradients_by_name
from tests.parallel.toy import toy_batches, toy_loss


@pytest.mark.parametrize(
    "runtime", [Layout(), Layout(distributed_optimizer=False)], indirect=True, ids=["distributed", "whole"]
)
def test_it_learns(make_learner: Callable, runtime: Runtime) -> None:
    learner = make_learner()
    losses = [learner.step(toy_batches(2), toy_loss).loss for _ in range(15)]
    assert losses[0] == pytest.approx(math.log(48), rel=0.05)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("runtime", [Layout(distributed_optimizer=False)], indirect=True)
def test_the_gradient_is_that_of_the_sum_over_the_denominator(make_learner: Callable, runtime: Runtime) -> None:
    learner, batches = make_learner(Optim(clip_grad=0.0)), toy_batches(3)
    plain = make_learner().model
    losses, weights = zip(*(toy_loss(plain, batch, plain(batch))[:2] for batch in batches), strict=True)
    expected = torch.autograd.grad(sum(losses) / sum(weights), list(plain.parameters()))
    result = learner.step(batches, toy_loss)
    assert result.loss == pytest.approx((sum(losses) / sum(weights)).item(), rel=1e-6)
    assert result.denominator == pytest.approx(float(sum(weights)), rel=1e-6)
    found = [parameter.main_grad for parameter in learner.model.parameters()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert result.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()), rel=1e-5)
    assert set(gradients_by_name(learner.model)) >= {"embedding.weight", "vision.weight", "head.weight"}


def test_clipping_bounds_the_update(make_learner: Callable) -> None:
    learner = make_learner(Optim(clip_grad=1e-3))
    result = learner.step(toy_batches(1), toy_loss)
    grads = [parameter.grad for parameter in learner.optimizer.get_parameters() if parameter.grad is not None]
    clipped = float(torch.cat([grad.flatten() for grad in grads]).norm())
    assert result.grad_norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-3)


def broken(value: float) -> Callable[..., Any]:
    def loss(model: Any, batch: Any, output: Any) -> Any:
        loss_sum, weight, metrics = toy_loss(model, batch, output)
        return loss_sum * value, weight, metrics

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(make_learner: Callable, value: float) -> None:
    learner, twin = make_learner(), make_learner()
    learner.step(toy_batches(2), toy_loss)
    twin.step(toy_batches(2), toy_loss)
    skipped = learner.step(toy_batches(2), broken(value))
    assert skipped.skipped and "not both finite" in skipped.reason
    twin.step_count += 1
    assert learner.step(toy_batches(2), toy_loss) == twin.step(toy_batches(2), toy_loss)
    for one, other in zip(learner.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_too_many_skips_in_a_row_stop_the_run(make_learner: Callable) -> None:
    learner = make_learner(learner={"max_skipped": 3})
    for _ in range(2):
        learner.step(toy_batches(1), broken(math.nan))
    learner.step(toy_batches(1), toy_loss)
    for _ in range(2):
        learner.step(toy_batches(1), broken(math.nan))
    with pytest.raises(TrainingDiverged, match="3 updates in a row were skipped.*lower optim.lr"):
        learner.step(toy_batches(1), broken(math.nan))


def test_a_step_without_loss_rows_is_skipped_and_not_held_against_the_run(make_learner: Callable) -> None:
    learner, batches = make_learner(learner={"max_skipped": 1}), toy_batches(1)
    batches[0].weights.zero_()
    before = [parameter.clone() for parameter in learner.model.parameters()]
    result = learner.step(batches, toy_loss)
    assert result.skipped and "denominator is 0" in result.reason
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))


def test_forward_only_has_no_dropout_and_no_gradient(make_learner: Callable) -> None:
    learner = make_learner(hidden_dropout=0.5)
    seen = []

    def look(model: Any, batch: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append((model.training, output.requires_grad))
        return output

    first = learner.forward_only(toy_batches(2), look)
    second = learner.forward_only(toy_batches(2), look, broadcast=True)
    assert set(seen) == {(False, False)}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert learner.model.training


def test_no_micro_batch_is_an_error(make_learner: Callable) -> None:
    with pytest.raises(ValueError, match="microbatches is empty"):
        make_learner().step([], toy_loss)
    assert make_learner().forward_only([], toy_loss) == []


def test_bfloat16_keeps_float32_masters(make_learner: Callable) -> None:
    bf16 = dict(params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16)
    learner = make_learner(Optim(lr=1e-3), **bf16)
    losses = [learner.step(toy_batches(2), toy_loss).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    masters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in masters} == {torch.float32}

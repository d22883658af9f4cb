"""Annealing: its annotators, its tail, where it starts from, and batches that cannot be learned from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from r4b_core.modes import Mode
from r4b_core.parallel import checkpoint
from r4b_core.stages import anneal
from tests.stages.trials import Lab, copy_of


@pytest.mark.parametrize("tail", [Mode.DIRECT, Mode.THINKING])
def test_the_tail_trains_one_mode_alone(lab: Lab, tail: Mode) -> None:
    trial = lab.anneal(
        "anneal.steps=1", f"anneal.tail={tail}", "anneal.tail_steps=2", "anneal.tail_lr=0.003", "anneal.batch_size=16"
    )
    assert {sample.mode for sample in trial.samples[0]} == {Mode.DIRECT, Mode.THINKING}
    for samples in trial.samples[1:]:
        assert {sample.mode for sample in samples} == {tail}
        assert all((sample.response or "").startswith("\n\n</think>") is (tail is Mode.DIRECT) for sample in samples)
    assert [line["lr"] for line in trial.lines] == [0.01, 0.003, 0.003]
    assert [line["data/thinking_share"] for line in trial.lines[1:]] == [float(tail is Mode.THINKING)] * 2


def test_a_tail_that_is_not_asked_for_adds_no_step(lab: Lab) -> None:
    assert len(lab.anneal("anneal.steps=1", "anneal.tail_steps=2").results) == 1


@pytest.mark.parametrize("right,mode", [(1.0, Mode.DIRECT), (0.0, Mode.THINKING)])
def test_the_model_annotates_by_its_own_tries(lab: Lab, right: float, mode: Mode) -> None:
    judged: list[str] = []

    def judge(text: str, gold: str) -> float:
        judged.append(text)
        return right

    lab.reward(judge)
    trial = lab.anneal("anneal.steps=1", "anneal.annotator=model", "anneal.tries=3")
    assert [sample.mode for sample in trial.samples[0]] == [mode] * 4
    assert [sample.pass_rate for sample in trial.samples[0]] == [right] * 4
    assert len(set(judged)) > 1 and all(text.startswith("\n\n</think>") for text in judged)


def test_the_stand_in_lets_some_questions_be_thought_about(lab: Lab) -> None:
    (samples,) = lab.anneal("anneal.steps=1", "anneal.batch_size=32").samples
    looked_up = [sample for sample in samples if sample.source != "value"]
    assert sum(sample.mode is Mode.DIRECT for sample in looked_up) > len(looked_up) / 2
    assert {sample.mode for sample in samples if sample.source == "value"} == {Mode.DIRECT, Mode.THINKING}


@pytest.mark.parametrize("whole_run", [True, False])
def test_starting_from_the_weights_of_another_run(lab: Lab, whole_run: bool) -> None:
    first = lab.anneal("anneal.steps=1")
    run = first.job.run.path
    path = checkpoint.latest(run / "checkpoints" / "anneal")
    assert path is not None
    job = lab.job("seed=5", f"model.init_from={run if whole_run else path}")
    mine = copy_of(job.model)
    assert all(torch.equal(mine[name], value) for name, value in first.weights[-1].items())
    assert not all(torch.equal(mine[name], value) for name, value in first.weights[0].items())


def test_a_batch_whose_loss_is_not_finite_is_skipped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    head, calls = anneal.sft_head, 0

    def poisoned(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, denominator, metrics = head(*arguments)
        return loss * (float("nan") if calls == 2 else 1.0), denominator, metrics

    monkeypatch.setattr(anneal, "sft_head", poisoned)
    trial = lab.anneal("anneal.steps=3")
    assert ["skipped" in line for line in trial.lines if "lr" in line] == [False, True, False]
    skipped = next(line for line in trial.lines if "skipped" in line)
    assert "not both finite" in skipped["skipped"] and skipped["loss"] != skipped["loss"]
    assert any("alarm/non_finite" in line for line in trial.lines)
    start, first, second, third = trial.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(start[name], first[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(bool(value.isfinite().all()) for value in third.values())

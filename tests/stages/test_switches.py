"""Every algorithm and every switch of BPO does what it says, seen on one or two steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from r4b_core.modes import TURN_END, Mode
from r4b_core.rollout.types import FinishReason, Group
from r4b_core.stages.job import Job
from tests.stages.trials import Lab, Trial, coin


@pytest.fixture(autouse=True)
def coins(lab: Lab) -> None:
    lab.reward(coin)


def rewards(group: Group) -> torch.Tensor:
    return torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float64)


def advantages(group: Group) -> torch.Tensor:
    return torch.tensor([rollout.advantage for rollout in group.rollouts], dtype=torch.float64)


def column(trial: Trial, name: str, update: int = 0) -> torch.Tensor:
    return torch.cat([batch.row_data[name] for batch in trial.batches[update]])


def row_weights(trial: Trial) -> torch.Tensor:
    return torch.cat([batch.row_weight for batch in trial.batches[0]])


def responses(trial: Trial) -> torch.Tensor:
    """The response of every row, numbered through all micro-batches."""
    numbers, first = [], 0
    for batch in trial.batches[0]:
        numbers.append(batch.row_sequence + first)
        first += batch.num_sequences
    return torch.cat(numbers)


@pytest.mark.parametrize("algorithm", ["bpo", "grpo", "gspo", "dr_grpo", "dapo"])
def test_every_algorithm_trains_on_its_own_kind_of_rollouts(lab: Lab, algorithm: str) -> None:
    trial = lab.bpo(f"bpo.algorithm={algorithm}", "bpo.steps=2")
    both = [Mode.THINKING, Mode.THINKING, Mode.DIRECT, Mode.DIRECT]
    for group in (group for groups in trial.groups for group in groups):
        assert [rollout.mode for rollout in group.rollouts] == (both if algorithm == "bpo" else [Mode.AUTO] * 4)
        r, deviation = rewards(group), rewards(group).std() + 1e-6
        expected = (r - r.mean()) / (deviation if algorithm != "dr_grpo" else 1.0)
        torch.testing.assert_close(advantages(group), expected, rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in trial.lines if "loss" in line] == [1, 2]
    assert not any(result.skipped for result in trial.results)
    before, after = trial.weights[0], trial.weights[-1]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("vision.") for name in moved)


@pytest.mark.parametrize("baseline", ["union", "per_mode", "leave_one_out"])
@pytest.mark.parametrize("std", [True, False])
def test_the_baseline_and_the_deviation(lab: Lab, baseline: str, std: bool) -> None:
    trial = lab.bpo(f"bpo.advantage={baseline}", f"bpo.std={str(std).lower()}", "bpo.group_size=3", "bpo.kl_coef=0")
    for group in trial.groups[0]:
        r = rewards(group)
        expected = torch.zeros_like(r)
        for members in (slice(0, 3), slice(3, 6)) if baseline == "per_mode" else (slice(0, 6),):
            mine = r[members]
            n = len(mine)
            base = (mine.sum() - mine) / (n - 1) if baseline == "leave_one_out" else mine.mean()
            expected[members] = (mine - base) / (mine.std() + 1e-6 if std else 1.0)
        torch.testing.assert_close(advantages(group), expected, rtol=1e-4, atol=1e-5)
    assert any(0 < rewards(group).mean() < 1 for group in trial.groups[0])
    assert not (trial.job.run.path / "checkpoints" / "reference").exists()  # without a KL term none is kept


def test_what_the_paper_calls_the_union_differs_from_one_baseline_per_mode(lab: Lab) -> None:
    union, per_mode = (lab.bpo(f"bpo.advantage={baseline}") for baseline in ("union", "per_mode"))
    assert [r.tokens for r in union.rollouts] == [r.tokens for r in per_mode.rollouts]
    assert [r.advantage for r in union.rollouts] != [r.advantage for r in per_mode.rollouts]


@pytest.mark.parametrize("treatment", ["include", "exclude"])
def test_forced_tokens_carry_loss_or_none(lab: Lab, treatment: str) -> None:
    trial = lab.bpo(f"bpo.mode_token_loss={treatment}")
    place = torch.cat([torch.arange(len(rollout.tokens)) for rollout in trial.rollouts])
    forced = torch.cat([torch.full((len(rollout.tokens),), rollout.forced) for rollout in trial.rollouts])
    weight = {(int(s), int(p)): 0.0 for s, p in zip(*_places(trial), strict=True)}
    for s, p, w in zip(*_places(trial), row_weights(trial).tolist(), strict=True):
        weight[int(s), int(p)] = w
    assert (place < forced).sum() == 3 * 2 * 1 + 3 * 2 * 2  # "\n", and "\n\n" with "</think>"
    zero = sum(w == 0 for w in weight.values())
    assert zero == (int((place < forced).sum()) if treatment == "exclude" else 0)
    if treatment == "exclude":
        opening = sum(weight[s, 0] == 0 for s in range(len(trial.rollouts)))
        assert opening == len(trial.rollouts)


def _places(trial: Trial) -> tuple[torch.Tensor, torch.Tensor]:
    """(response, place within it) of every row."""
    owner = responses(trial)
    place = torch.cat([torch.arange(int(n)) for n in torch.unique_consecutive(owner, return_counts=True)[1]])
    return owner, place


def test_emphasis_on_the_decision_token(lab: Lab) -> None:
    weight = row_weights(lab.bpo("bpo.mode_token_weight=5"))
    assert sorted(set(weight.tolist())) == [1.0, 5.0]
    assert int((weight == 5).sum()) == 3 * 4


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_the_reduction_and_the_logged_loss(lab: Lab, reduction: str) -> None:
    lab.reward(lambda text, gold: float(text.endswith(TURN_END)))  # so that the advantage goes with the length
    trial = lab.bpo(f"bpo.reduction={reduction}", "bpo.group_size=3", "bpo.prompts=4", "bpo.max_new_tokens=24")
    assert len({len(rollout.tokens) for rollout in trial.rollouts}) > 2
    lengths = torch.tensor([len(rollout.tokens) for rollout in trial.rollouts], dtype=torch.float64)
    advantage = torch.tensor([rollout.advantage for rollout in trial.rollouts], dtype=torch.float64)
    # At the first update every ratio is 1 and the KL 0, so a row's loss is minus its advantage.
    by_hand = {
        "token_mean": -(advantage * lengths).sum() / lengths.sum(),
        "sequence_mean": -advantage.mean(),
        "constant": -(advantage * lengths / 24).mean(),
    }[reduction]
    assert trial.lines[0]["loss"] == pytest.approx(float(by_hand), abs=2e-5)
    if reduction != "sequence_mean":
        assert abs(by_hand) > 1e-3


def test_sequence_importance_has_one_ratio_per_response(lab: Lab) -> None:
    switches = ("bpo.algorithm=gspo", "bpo.epochs=2", "bpo.kl_coef=0", "bpo.clip_low=0.9", "bpo.clip_high=9")
    sequence, token = (lab.bpo(*switches, f"bpo.importance={kind}") for kind in ("sequence", "token"))
    assert [r.tokens for r in sequence.rollouts] == [r.tokens for r in token.rollouts]
    first, second = sequence.results
    assert first.loss == pytest.approx(token.results[0].loss, abs=1e-6)
    assert second.loss != pytest.approx(token.results[1].loss, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["bpo", "gspo"])
def test_sharing_the_prompt_changes_no_number(lab: Lab, algorithm: str) -> None:
    shared, copied = (
        lab.bpo(f"bpo.algorithm={algorithm}", f"bpo.share_prefix={on}", "bpo.steps=2") for on in ("true", "false")
    )
    tokens = [sum(batch.num_tokens for batch in trial.batches[0]) for trial in (shared, copied)]
    assert tokens[0] < tokens[1]
    for one, other in zip(shared.results, copied.results, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recomputed_logprobs_are_those_of_the_rollout(lab: Lab, temperature: float) -> None:
    drawn, recomputed = (
        lab.bpo(f"bpo.old_logprob={kind}", f"bpo.temperature={temperature}") for kind in ("rollout", "recompute")
    )
    torch.testing.assert_close(column(drawn, "old_logprob"), column(recomputed, "old_logprob"), rtol=0, atol=1e-4)
    assert not torch.equal(column(drawn, "old_logprob"), column(recomputed, "old_logprob"))
    torch.testing.assert_close(column(recomputed, "old_logprob"), column(recomputed, "ref_logprob"))


def test_epochs_are_updates_on_the_same_rollouts(lab: Lab) -> None:
    trial = lab.bpo("bpo.epochs=2")
    assert len(trial.results) == 2 and len(trial.groups) == 1
    assert [line["step"] for line in trial.lines if "loss" in line] == [1]
    assert trial.lines[0]["loss"] == trial.results[1].loss != trial.results[0].loss
    assert trial.lines[0]["kl"] > 0 and trial.lines[0]["ratio"] != 1


def test_the_kl_term_holds_the_policy_to_the_annealed_one(lab: Lab) -> None:
    free, held = (lab.bpo(f"bpo.kl_coef={beta}", "bpo.epochs=2") for beta in (0, 10))
    assert free.results[0].grad_norm == pytest.approx(held.results[0].grad_norm, rel=1e-4)
    assert free.lines[0]["kl"] == 0 and held.lines[0]["kl"] > 0
    assert held.results[1].loss > free.results[1].loss + held.lines[0]["kl"]


def test_length_costs(lab: Lab) -> None:
    trial = lab.bpo("bpo.length_cost=0.25")
    for rollout in trial.rollouts:
        assert rollout.reward == pytest.approx(coin(rollout.text, "") - 0.25 * len(rollout.tokens) / 8)


def test_groups_without_variance_are_drawn_again(lab: Lab) -> None:
    asked: list[str] = []

    def judge(text: str, gold: str) -> float:
        asked.append(gold)
        return coin(text, gold) if len(asked) > 2 * 4 else 1.0  # the first two of three groups all are right

    lab.reward(judge)
    trial = lab.bpo("bpo.drop_zero_variance=true")
    assert len(asked) > 3 * 4
    assert 0 < len(trial.groups[0]) <= 3
    assert all(len(set(rewards(group).tolist())) > 1 for group in trial.groups[0])
    ids = [group.sample.id for group in trial.groups[0]]
    assert len(set(ids)) == len(ids) and any("/bpo/1/" in name for name in ids)


def test_a_step_of_equal_rewards_moves_nothing(lab: Lab) -> None:
    lab.reward(lambda text, gold: 1.0)
    trial = lab.bpo("bpo.drop_zero_variance=true", "bpo.optim={lr: 0.01, weight_decay: 0}")
    assert all(rollout.advantage == 0 for rollout in trial.rollouts) and len(trial.groups[0]) == 3
    assert trial.results[0].loss == pytest.approx(0, abs=1e-6) and trial.results[0].grad_norm < 1e-4


def test_probes_come_when_they_are_due(lab: Lab) -> None:
    trial = lab.bpo("bpo.steps=3", "bpo.probe_every=2", "bpo.probe_prompts=2")
    assert ["thinking_rate/free" in line for line in trial.lines if "loss" in line] == [True, False, True]


def test_a_rollout_that_never_stops_ends_with_its_budget(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real reward
    init = Job.__init__

    def endless(job: Job, *arguments: object) -> None:
        init(job, *arguments)  # type: ignore[arg-type]
        tags = replace(job.tokenizer.mode_tokens, turn_end=-1)
        job.tokenizer.__dict__["mode_tokens"] = tags

    monkeypatch.setattr(Job, "__init__", endless)
    trial = lab.bpo()
    assert all(len(rollout.tokens) == 8 for rollout in trial.rollouts)
    assert all(rollout.finish is FinishReason.LENGTH and rollout.reward == 0 for rollout in trial.rollouts)
    assert trial.lines[0]["truncation/thinking"] == trial.lines[0]["truncation/direct"] == 1
    assert any("alarm/truncation" in name for line in trial.lines for name in line)


def test_the_same_seed_gives_the_same_and_another_gives_another(lab: Lab) -> None:
    one, again, other = lab.bpo(), lab.bpo(), lab.bpo("seed=1")
    assert one.lines == again.lines and [r.tokens for r in one.rollouts] == [r.tokens for r in again.rollouts]
    assert all(torch.equal(one.weights[-1][name], again.weights[-1][name]) for name in one.weights[-1])
    assert one.lines != other.lines and [r.seed for r in one.rollouts] != [r.seed for r in other.rollouts]

from __future__ import annotations

from collections import Counter

import pytest

from r4b_core.data.annotate import StandInAnnotator, annotate, objective_rule, subjective_rule
from r4b_core.data.boards import make_samples, write_response
from r4b_core.data.schema import Sample
from r4b_core.modes import Mode
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier

MIX = {"read": 0.2, "count": 0.2, "value": 0.6}
JUDGE = AnswerReward(Verifier(mathematics=False))


def test_objective_rule() -> None:
    assert [objective_rule(right) for right in range(9)] == [Mode.THINKING] + [Mode.DIRECT] * 8
    with pytest.raises(ValueError, match="num_right = -1"):
        objective_rule(-1)


def test_subjective_rule() -> None:
    assert subjective_rule(" Reason.\n") is Mode.THINKING
    assert subjective_rule("direct") is Mode.DIRECT
    with pytest.raises(ValueError, match="annotator said 'maybe'"):
        subjective_rule("maybe")


def test_annotation_counts_tries_with_the_reward() -> None:
    sample = Sample("a", "value", [], "final value ?", "7", provenance={"board": "4 +3"})
    right, wrong = "\n\n</think>7<|im_end|>", "\n\n</think>1<|im_end|>"
    thinking, direct = annotate(
        [sample] * 2, [[wrong, "\n7", wrong], [wrong, right, right, right]], JUDGE, write_response
    )
    assert (thinking.mode, thinking.pass_rate) == (Mode.THINKING, 0.0)
    assert thinking.response == "\n#1 4 #2 +3 7</think>7<|im_end|>"
    assert (direct.mode, direct.pass_rate, direct.response) == (Mode.DIRECT, 0.75, right)
    assert sample.mode is None
    with pytest.raises(ValueError, match="'a' has no tries"):
        annotate([sample], [[]], JUDGE, write_response)


def test_stand_in_gives_the_papers_proportions() -> None:
    annotator = StandInAnnotator(0)
    total, thinking = Counter(), Counter()
    for step in range(40):
        samples = make_samples("train", 0, "anneal", step, 100, MIX)
        for sample in annotate(samples, annotator.respond(samples, 8), JUDGE, write_response):
            kind = "look" if sample.difficulty == "easy" else "value"
            total[kind] += 1
            thinking[kind] += sample.mode is Mode.THINKING
    assert abs(thinking["look"] / total["look"] - 0.12) < 0.03
    assert abs(thinking["value"] / total["value"] - 0.43) < 0.04


def test_stand_in_fails_on_whole_boards() -> None:
    """Its failures on easy boards are boards that it never reads, not tries that happen to go wrong."""
    samples = make_samples("train", 1, "anneal", 0, 1000, {"read": 1.0})
    annotated = annotate(samples, StandInAnnotator(0).respond(samples, 8), JUDGE, write_response)
    rates = Counter(sample.pass_rate == 0 for sample in annotated)
    assert 80 < rates[True] < 160
    seen = [sample.pass_rate for sample in annotated if sample.pass_rate]
    assert 0.87 < sum(seen) / len(seen) < 0.93
    blind = [
        row
        for row, sample in zip(StandInAnnotator(0).respond(samples, 8), annotated, strict=True)
        if not sample.pass_rate
    ]
    assert all(len(set(row)) == 1 for row in blind)


def test_stand_in_guesses_values_uniformly() -> None:
    samples = make_samples("train", 1, "anneal", 0, 500, {"value": 1.0}, "hard")
    guesses = Counter(answer for row in StandInAnnotator(3).respond(samples, 8) for answer in row)
    assert len(guesses) == 10
    assert max(guesses.values()) < 1.25 * min(guesses.values())


def test_stand_in_depends_on_seed_and_sample_alone() -> None:
    samples = make_samples("train", 1, "anneal", 0, 50, MIX)
    whole = StandInAnnotator(5).respond(samples, 8)
    assert StandInAnnotator(5).respond(samples[20:], 8) == whole[20:]
    assert [row[:3] for row in whole] == StandInAnnotator(5).respond(samples, 3)
    assert StandInAnnotator(6).respond(samples, 8) != whole

from __future__ import annotations

import pytest

from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.modes import Mode
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.types import FinishReason, Group, Rollout

TOKENIZER = ToyTokenizer()


def rollout(text: str, finish: FinishReason = FinishReason.STOP) -> Rollout:
    tokens = TOKENIZER.encode(text)
    return Rollout(tokens, [0.0] * len(tokens), [0.0] * len(tokens), Mode.DIRECT, Mode.DIRECT, 2, finish, 0, 0.5)


def group(*rollouts: Rollout, answer: str = "7") -> Group:
    return Group(Sample("a", "value", [], "final value ?", answer), [], list(rollouts))


def scored(reward: AnswerReward, *rollouts: Rollout, answer: str = "7") -> list[tuple[float, str]]:
    groups = [group(*rollouts, answer=answer)]
    reward.score_groups(groups, TOKENIZER.decode)
    return [(rollout.reward, rollout.reward_reason) for rollout in groups[0].rollouts]


def test_reward_is_correctness() -> None:
    reward = AnswerReward(Verifier(mathematics=False))
    assert scored(
        reward,
        rollout("\n\n</think>7<|im_end|>"),
        rollout("\n#1 4</think>8<|im_end|>"),
        rollout("\n\n</think>3 7<|im_end|>"),
        rollout("\n\n</think>#1 7<|im_end|>"),
        rollout("\n\n<|im_end|>"),
    ) == [
        (1.0, "right: same text"),
        (0.0, "wrong: another number"),
        (0.0, "wrong: several numbers"),
        (0.0, "undecided: other words"),
        (0.0, "no answer: the reasoning was never closed"),
    ]


def test_truncated_responses_are_not_right() -> None:
    reward = AnswerReward(Verifier(mathematics=False))
    assert scored(
        reward,
        rollout("\n\n</think>7", FinishReason.LENGTH),
        rollout("\n#1 4 #2", FinishReason.LENGTH),
    ) == [
        (0.0, "truncated: the answer never ended"),
        (0.0, "no answer: the reasoning was never closed (truncated)"),
    ]


def test_text_is_kept_for_reports() -> None:
    groups = [group(rollout("\n\n</think>7<|im_end|>"))]
    AnswerReward(Verifier(mathematics=False)).score_groups(groups, TOKENIZER.decode)
    assert groups[0].rollouts[0].text == "\n\n</think>7<|im_end|>"


def test_undecided_is_never_right() -> None:
    ((value, reason),) = scored(AnswerReward(), rollout("\n\n</think>7<|im_end|>"), answer="")
    assert value == 0.0 and reason == "undecided: the reference answer is empty"


def test_length_cost_is_a_share_of_the_budget() -> None:
    reward = AnswerReward(Verifier(mathematics=False), length_cost=0.1, budget=40)
    right, wrong = scored(reward, rollout("\n\n</think>7<|im_end|>"), rollout("\n#1 4</think>8<|im_end|>"))
    assert right[0] == pytest.approx(1 - 0.1 * 4 / 40)
    assert wrong[0] == pytest.approx(-0.1 * 6 / 40)


def test_judge_scores_one_response() -> None:
    judge = AnswerReward(Verifier(mathematics=False), length_cost=0.5, budget=10)
    assert judge("\n\n</think>7<|im_end|>", "7") == 1.0
    assert judge("\n\n</think>1<|im_end|>", "10") == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(length_cost=-1.0), "must not be negative"), (dict(length_cost=0.1), "needs a positive budget")],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerReward(**settings)

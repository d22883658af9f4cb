"""The reward: 1 for a right answer, 0 for anything else (R-4B section 3: rule-based correctness, no other term)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r4b_core.rewards.answer import extract_answer
from r4b_core.rewards.verify import Outcome, Verdict, Verifier
from r4b_core.rollout.types import FinishReason, Group, Rollout


@dataclass(frozen=True)
class Score:
    """Reward of a response and why."""

    reward: float
    reason: str


class AnswerReward:
    """Scores responses by their answers.

    ``length_cost`` takes that much times tokens / ``budget`` off the reward, for right and wrong answers alike. The
    paper has no such term; 0 leaves it out.
    """

    def __init__(self, verifier: Verifier | None = None, length_cost: float = 0.0, budget: int | None = None) -> None:
        """
        Raises:
            ValueError: if the length cost is negative, or has no budget to be measured by.
        """
        if length_cost < 0:
            raise ValueError(f"length_cost = {length_cost}: must not be negative")
        if length_cost and not budget:
            raise ValueError(f"length_cost = {length_cost} needs a positive budget: give max_new_tokens")
        self.verifier = verifier or Verifier()
        self.length_cost, self.budget = length_cost, budget

    def __call__(self, response: str, gold: str) -> float:
        """Reward of one finished response, the text after ``<think>``, without the length cost."""
        return self.score([(response, gold, True)])[0].reward

    def score(self, responses: Sequence[tuple[str, str, bool]]) -> list[Score]:
        """Score (response, reference, finished) triples, in order, without the length cost.

        A response that ran out of budget is not right: its answer may be the beginning of another one.
        """
        extracted = [extract_answer(text) for text, _, _ in responses]
        pairs = [
            (found.answer, gold)
            for found, (_, gold, finished) in zip(extracted, responses, strict=True)
            if finished and found.answer is not None
        ]
        verdicts = iter(self.verifier.verify_many(pairs))
        scores = []
        for found, (_, _, finished) in zip(extracted, responses, strict=True):
            if found.answer is None:
                scores.append(Score(0.0, found.reason if finished else f"{found.reason} (truncated)"))
            elif not finished:
                scores.append(Score(0.0, "truncated: the answer never ended"))
            else:
                scores.append(_score(next(verdicts)))
        return scores

    def score_groups(self, groups: Sequence[Group], decode: Callable[[Sequence[int]], str]) -> None:
        """Set ``text``, ``reward`` and ``reward_reason`` of every rollout."""
        rollouts = [(rollout, group.sample.answer) for group in groups for rollout in group.rollouts]
        for rollout, _ in rollouts:
            rollout.text = decode(rollout.tokens)
        scores = self.score([(rollout.text, gold, rollout.finish is FinishReason.STOP) for rollout, gold in rollouts])
        for (rollout, _), score in zip(rollouts, scores, strict=True):
            rollout.reward = score.reward - self._cost_of(rollout)
            rollout.reward_reason = score.reason

    def _cost_of(self, rollout: Rollout) -> float:
        return self.length_cost * len(rollout.tokens) / self.budget if self.budget else 0.0


def _score(verdict: Verdict) -> Score:
    reward = 1.0 if verdict.outcome is Outcome.RIGHT else 0.0
    return Score(reward, f"{verdict.outcome}: {verdict.reason}")

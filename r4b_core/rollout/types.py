"""Rollout and Group: what an engine returns and the learner consumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from r4b_core.data.schema import Sample
from r4b_core.modes import Mode


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How to draw one response.

    Attributes:
        max_new_tokens: budget, forced tokens included.
        temperature: 0 is greedy; log-probs are those of the distribution sampled from (temperature 1 for greedy).
        top_p: nucleus, 1 keeps everything; behaviour log-probs stay those of the full distribution.

    Raises:
        ValueError: if a value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: a response has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be positive, or 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (1 keeps every token)")


@dataclass(frozen=True)
class Request:
    """One response to draw: its prompt by index, the mode to force (AUTO forces none) and its own seed."""

    prompt: int
    mode: Mode
    seed: int


@dataclass
class Rollout:
    """One response.

    Attributes:
        tokens: everything after ``<think>``, forced tokens first, turn end included when it came.
        logprobs: the policy's log-probability of each token when it was drawn (also of the forced ones).
        entropies: the policy's entropy at each token.
        mode: what was asked for (AUTO where the model decided).
        taken: the mode that the decision token stands for; AUTO where it is neither.
        forced: how many leading tokens were forced.
        thinking_probability: the policy's probability of the thinking decision, p(newline) at the first token.
        reward: set by the reward, with ``reward_reason``.
    """

    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]
    mode: Mode
    taken: Mode
    forced: int
    finish: FinishReason
    seed: int
    thinking_probability: float
    reward: float = float("nan")
    reward_reason: str = ""
    text: str = ""
    advantage: float = float("nan")


@dataclass
class Group:
    """A prompt and its rollouts (BPO: g thinking, then g direct)."""

    sample: Sample
    prompt_tokens: list[int]
    rollouts: list[Rollout] = field(default_factory=list)

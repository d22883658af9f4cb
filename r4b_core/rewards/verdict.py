"""The three outcomes of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right. Undecided, with the reason, where nobody can tell: never counted as right."""

    outcome: Outcome
    reason: str


def right(reason: str) -> Verdict:
    return Verdict(Outcome.RIGHT, reason)


def wrong(reason: str) -> Verdict:
    return Verdict(Outcome.WRONG, reason)


def undecided(reason: str) -> Verdict:
    return Verdict(Outcome.UNDECIDED, reason)

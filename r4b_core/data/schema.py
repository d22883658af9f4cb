"""Sample: one record, from whatever file it came."""

from __future__ import annotations

from dataclasses import dataclass, field

from numpy import ndarray

from r4b_core.modes import Mode


@dataclass
class Sample:
    """One question with its images.

    Attributes:
        id: unique within its source.
        source: name of the data set or task family; thinking rates are reported by it.
        images: decoded images, uint8 [height, width, 3].
        question: the user's text; ``<image>`` marks where images go (prepended when absent).
        answer: short reference answer, compared by the reward.
        response: training target after ``<think>``, decision included, or None for a prompt without one.
        mode: the mode of ``response``.
        pass_rate: share of right direct answers among k tries of some model, if measured.
        difficulty: label for reports only ("easy", "mid", "hard"); never shown to the model.
        provenance: free notes on where the record came from.
    """

    id: str
    source: str
    images: list[ndarray]
    question: str
    answer: str
    response: str | None = None
    mode: Mode | None = None
    pass_rate: float | None = None
    difficulty: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

"""Which samples are to be thought about: R-4B's annotation of annealing data (section 2.1).

Objective questions: a model tries each k times; a sample that it never gets right is one to think about, one that it
gets right at least once is answered directly. Open questions: the annotator says in words whether reasoning is needed.
The label only decides which response a sample is trained on; the model is never shown it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from r4b_core.data.schema import Sample
from r4b_core.modes import FORCED_TEXT, TURN_END, Mode

Judge = Callable[[str, str], float]
"""(response after ``<think>``, reference answer) -> reward; the very function that RL uses. Above 0.5 is right."""

Writer = Callable[[Sample, Mode], str]
"""(sample, mode) -> the response to train on, from a teacher or from the task itself."""


def objective_rule(num_right: int) -> Mode:
    """The mode of an objective question of whose k tries ``num_right`` were right."""
    if num_right < 0:
        raise ValueError(f"num_right = {num_right}: a count of right tries cannot be negative")
    return Mode.DIRECT if num_right else Mode.THINKING


def subjective_rule(word: str) -> Mode:
    """The mode that an annotator's word on an open question stands for.

    Raises:
        ValueError: if the word is neither of the two that the annotator is asked for.
    """
    modes = {"reason": Mode.THINKING, "direct": Mode.DIRECT}
    try:
        return modes[word.strip().strip(".").casefold()]
    except KeyError:
        raise ValueError(f"annotator said {word!r}: expected 'reason' or 'direct'") from None


def annotate(samples: Sequence[Sample], tries: Sequence[Sequence[str]], judge: Judge, write: Writer) -> list[Sample]:
    """Copies of the samples with mode, pass rate and response set by the objective rule.

    Args:
        samples: questions with reference answers.
        tries: the responses to each sample, after ``<think>``: an annotator's, or rollouts of the model itself.
        judge: the reward.
        write: writes the response in the mode chosen.

    Raises:
        ValueError: if a sample has no tries.
    """
    annotated = []
    judged: dict[tuple[str, str], float] = {}
    for sample, responses in zip(samples, tries, strict=True):
        if not responses:
            raise ValueError(f"sample {sample.id!r} has no tries: the objective rule needs at least one")
        right = 0
        for pair in ((response, sample.answer) for response in responses):
            if pair not in judged:
                judged[pair] = judge(*pair)
            right += judged[pair] > 0.5
        mode = objective_rule(right)
        pass_rate = right / len(responses)
        annotated.append(replace(sample, mode=mode, pass_rate=pass_rate, response=write(sample, mode)))
    return annotated


class StandInAnnotator:
    """Stands in for R-4B's annotator, a 32B model, on the board task: it looks but does not calculate.

    It is no model. It is given the reference answer and decides how a model that only looks would fare:

    * what one look answers (reading, counting, the final value of a board whose last tile is a *set*): right in 9 tries
      of 10, but 12 % of the boards it cannot make out at all, and gives the same wrong answer every time;
    * final values that take arithmetic: a random digit. All of 8 random digits are wrong for 43 % of these questions.

    The same sample, seed and number of tries give the same responses. Its tries go through the same judge and the same
    rule as a real annotator's would.
    """

    BLIND_SHARE = 0.12
    ACCURACY = 0.9

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def respond(self, samples: Sequence[Sample], tries: int) -> list[list[str]]:
        """``tries`` direct responses to each sample, after ``<think>``."""
        keys = np.array([zlib.crc32(sample.id.encode()) for sample in samples], np.uint64)
        blind = self._uniform(keys, 0) < self.BLIND_SHARE
        misread = self._uniform(keys, 1)
        columns = np.arange(tries)
        guess = self._uniform(keys[:, None], 2 + 2 * columns)
        slip = self._uniform(keys[:, None], 3 + 2 * columns) >= self.ACCURACY
        truth = np.array([int(sample.answer) for sample in samples])
        looking = np.array([sample.difficulty == "easy" for sample in samples])
        wrong = np.where(blind[:, None], misread[:, None], guess)
        seen = np.where(blind[:, None] | slip, truth[:, None] + 1 + (9 * wrong).astype(np.int64), truth[:, None]) % 10
        answers = np.where(looking[:, None], seen, (10 * guess).astype(np.int64))
        opening = "".join(FORCED_TEXT[Mode.DIRECT])
        return [[f"{opening}{answer}{TURN_END}" for answer in row] for row in answers.tolist()]

    def _uniform(self, keys: NDArray[np.uint64], draw: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """Numbers in [0, 1) that depend on the seed, the key and the draw alone (SplitMix64)."""
        golden = np.uint64(0x9E3779B97F4A7C15)
        state = (keys << np.uint64(32)) + np.uint64(self.seed % 2**32)
        mixed = state * golden + np.asarray(draw, np.uint64) * np.uint64(0xD1342543DE82EF95)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return (mixed >> np.uint64(11)).astype(np.float64) / 2**53

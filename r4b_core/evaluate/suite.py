"""Accuracy, tokens and thinking rate by family and mode, greedy, on held-out images.

Families: ``easy`` (one look: reading, counting, boards whose last tile is a *set*), ``mid`` (one or two operations) and
``hard`` (three or more). The same prompts are answered in all three modes in one batch, each prompt computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from r4b_core.config.recipe import Recipe
from r4b_core.data.boards import make_samples
from r4b_core.data.encoding import encode_prompt
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import Tokenizer
from r4b_core.modes import Mode
from r4b_core.parallel.runtime import Runtime
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.types import Group, Request, Rollout, SamplingParams

FAMILIES = ("easy", "mid", "hard")
REPORTED = ("easy", "hard")
FIGURES = ("accuracy", "mean_tokens", "thinking_rate")
MODES = (Mode.DIRECT, Mode.THINKING, Mode.AUTO)
MIX = {"read": 1.0, "count": 1.0, "value": 1.0}


@dataclass(frozen=True)
class Cell:
    """One family in one mode. ``thinking_probability`` is the mean p(think), which a greedy rate hides."""

    accuracy: float
    mean_tokens: float
    thinking_rate: float
    thinking_probability: float

    @staticmethod
    def of(rollouts: Sequence[Rollout]) -> Cell:
        return Cell(
            fmean(rollout.reward for rollout in rollouts),
            fmean(len(rollout.tokens) for rollout in rollouts),
            fmean(rollout.taken is Mode.THINKING for rollout in rollouts),
            fmean(rollout.thinking_probability for rollout in rollouts),
        )


@dataclass(frozen=True)
class Evaluation:
    """``cells[family][mode]``, and the auto accuracy where images were dealt to the wrong questions."""

    cells: dict[str, dict[str, Cell]]
    shuffled: dict[str, float]

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """The figures of summary.json: families easy and hard; accuracy, mean_tokens and thinking_rate."""
        table = table_of(self.metrics())
        assert table is not None
        return table

    def metrics(self) -> dict[str, float]:
        """The same and more as ``eval/{family}/{mode}/{figure}`` and ``eval/{family}/shuffled_images/accuracy``."""
        rows = {
            f"eval/{family}/{mode}/{figure}": value
            for family, modes in self.cells.items()
            for mode, cell in modes.items()
            for figure, value in asdict(cell).items()
        }
        return rows | {f"eval/{family}/shuffled_images/accuracy": value for family, value in self.shuffled.items()}


def table_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]] | None:
    """``Evaluation.table()`` from a line of metrics.jsonl; None if the line is of something else."""
    if f"eval/{REPORTED[0]}/{MODES[0]}/{FIGURES[0]}" not in metrics:
        return None
    return {
        family: {mode.value: {key: metrics[f"eval/{family}/{mode}/{key}"] for key in FIGURES} for mode in MODES}
        for family in REPORTED
    }


def evaluate(recipe: Recipe, runtime: Runtime, tokenizer: Tokenizer, engine: EmbeddedEngine) -> Evaluation:
    """Answer ``recipe.evaluate.items`` held-out items per family in every mode, and in auto mode with wrong images."""
    cells: dict[str, dict[str, Cell]] = {}
    shuffled: dict[str, float] = {}
    with Verifier(mathematics=False) as verifier:  # a board's answers are digits
        reward = AnswerReward(verifier)
        for family in FAMILIES:
            samples = make_samples(
                "held_out", recipe.seed, "evaluate", 0, recipe.evaluate.items, MIX, family, config=recipe.data
            )
            groups = _answer(recipe, runtime, tokenizer, engine, samples, MODES)
            reward.score_groups(groups, tokenizer.decode)
            cells[family] = {
                mode.value: Cell.of([rollout for group in groups for rollout in group.rollouts if rollout.mode is mode])
                for mode in MODES
            }
            mixed = _answer(recipe, runtime, tokenizer, engine, deal_images(samples), (Mode.AUTO,))
            reward.score_groups(mixed, tokenizer.decode)
            shuffled[family] = fmean(rollout.reward for group in mixed for rollout in group.rollouts)
    return Evaluation(cells, shuffled)


def deal_images(samples: list[Sample]) -> list[Sample]:
    """Every question with the next sample's image: a model that looks must now fail. At least two samples."""
    assert len(samples) > 1
    return [replace(sample, images=samples[(i + 1) % len(samples)].images) for i, sample in enumerate(samples)]


def _answer(
    recipe: Recipe,
    runtime: Runtime,
    tokenizer: Tokenizer,
    engine: EmbeddedEngine,
    samples: list[Sample],
    modes: Sequence[Mode],
) -> list[Group]:
    prompts = [encode_prompt(tokenizer, sample) for sample in samples]
    requests = [Request(prompt, mode, 0) for prompt in range(len(prompts)) for mode in modes]
    params = SamplingParams(recipe.bpo.max_new_tokens, temperature=0.0)
    return generate_groups(engine, runtime, samples, prompts, requests, params)

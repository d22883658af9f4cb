"""Accuracy, tokens, truncation and thinking rate by family and mode, greedy, on held-out images.

Families of records are their sources, and all of them together. Families of boards: ``easy`` (one look: reading,
counting, boards whose last tile is a *set*), ``mid`` (one or two operations) and ``hard`` (three or more). The same
prompts are answered in all three modes in one batch, each prompt computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from r4b_core.config.recipe import Recipe
from r4b_core.data.boards import make_samples
from r4b_core.data.prompts import Prompt, Prompts, choose
from r4b_core.data.schema import Sample
from r4b_core.models.processor import Processor
from r4b_core.modes import Mode
from r4b_core.parallel.runtime import Runtime
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.types import FinishReason, Group, Request, Rollout, SamplingParams
from r4b_core.stages.source import agreed, held_out_files

FAMILIES = ("easy", "mid", "hard")
OVERALL = "overall"
AT_ONCE = 64
REPORTED = ("easy", "hard")
FIGURES = ("accuracy", "mean_tokens", "thinking_rate")
MODES = (Mode.DIRECT, Mode.THINKING, Mode.AUTO)
MIX = {"read": 1.0, "count": 1.0, "value": 1.0}


@dataclass(frozen=True)
class Cell:
    """One family in one mode. ``thinking_probability`` is the mean p(think), which a greedy rate hides; ``truncation``
    is the share of responses that hit the budget."""

    accuracy: float
    mean_tokens: float
    thinking_rate: float
    thinking_probability: float
    truncation: float = 0.0

    @staticmethod
    def of(rollouts: Sequence[Rollout]) -> Cell:
        return Cell(
            fmean(rollout.reward for rollout in rollouts),
            fmean(len(rollout.tokens) for rollout in rollouts),
            fmean(rollout.taken is Mode.THINKING for rollout in rollouts),
            fmean(rollout.thinking_probability for rollout in rollouts),
            fmean(rollout.finish is FinishReason.LENGTH for rollout in rollouts),
        )


@dataclass(frozen=True)
class Evaluation:
    """``cells[family][mode]``, and the auto accuracy where images were dealt to the wrong questions."""

    cells: dict[str, dict[str, Cell]]
    shuffled: dict[str, float]

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """What summary.json holds: accuracy, mean_tokens, thinking_rate by family and mode; of boards easy and hard."""
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
    last = f"/{MODES[0]}/{FIGURES[0]}"
    families = [
        name.removeprefix("eval/").removesuffix(last)
        for name in metrics
        if name.startswith("eval/") and name.endswith(last)
    ]
    if not families:
        return None
    return {
        family: {mode.value: {key: metrics[f"eval/{family}/{mode}/{key}"] for key in FIGURES} for mode in MODES}
        for family in (REPORTED if set(families) == set(FAMILIES) else families)
    }


def evaluate(recipe: Recipe, runtime: Runtime, processor: Processor, engine: EmbeddedEngine) -> Evaluation:
    """Answer held-out questions in every mode.

    Boards: ``recipe.evaluate.items`` per family, and once more in auto mode with wrong images. Records: as many of
    ``data.held_out_files`` in all, by source and overall; those that cannot be used are left out.

    Raises:
        ValueError: records without held-out files, or none of which can be used.
    """
    if recipe.data.task == "records":
        return evaluate_records(recipe, runtime, processor, engine)
    cells: dict[str, dict[str, Cell]] = {}
    shuffled: dict[str, float] = {}
    with Verifier(mathematics=False) as verifier:  # a board's answers are digits
        reward = AnswerReward(verifier)
        for family in FAMILIES:
            samples = make_samples(
                "held_out", recipe.seed, "evaluate", 0, recipe.evaluate.items, MIX, family, config=recipe.data
            )
            cells[family] = by_mode(_answer(recipe, runtime, processor, engine, reward, samples, MODES))
            mixed = _answer(recipe, runtime, processor, engine, reward, deal_images(samples), (Mode.AUTO,))
            shuffled[family] = fmean(rollout.reward for group in mixed for rollout in group.rollouts)
    return Evaluation(cells, shuffled)


def evaluate_records(recipe: Recipe, runtime: Runtime, processor: Processor, engine: EmbeddedEngine) -> Evaluation:
    """See `evaluate`."""
    files = held_out_files(recipe)
    if files is None:
        raise ValueError("data.held_out_files is empty: name files of records to evaluate on")
    prompts = Prompts(files, processor, recipe.packing.capacity)
    places = choose(recipe.evaluate.items, len(prompts), recipe.seed)
    groups: list[Group] = []
    with Verifier(mathematics=True) as verifier:
        reward = AnswerReward(verifier)
        # Pixels of few prompts at a time: a prompt's can take megabytes.
        for start in range(0, len(places), AT_ONCE):
            read = agreed(runtime, lambda start=start: prompts.read(places[start : start + AT_ONCE]))
            usable = [prompt for prompt in read if isinstance(prompt, Prompt)]
            if usable:
                answered = _generate(recipe, runtime, engine, usable, MODES)
                reward.score_groups(answered, processor.tokenizer.decode)
                groups += answered
    if not groups:
        raise ValueError(
            f"data.held_out_files: none of {len(places)} records can be used: they need a question, sound images, a "
            "reference answer, and no more tokens than packing.capacity"
        )
    sources: dict[str, list[Group]] = {}
    for group in groups:
        sources.setdefault(group.sample.source.replace("/", "_"), []).append(group)
    cells = {OVERALL: by_mode(groups), **{name: by_mode(mine) for name, mine in sorted(sources.items())}}
    return Evaluation(cells, {})


def by_mode(groups: Sequence[Group]) -> dict[str, Cell]:
    """The figures of each mode over all groups."""
    return {
        mode.value: Cell.of([rollout for group in groups for rollout in group.rollouts if rollout.mode is mode])
        for mode in MODES
    }


def deal_images(samples: list[Sample]) -> list[Sample]:
    """Every question with the next sample's image: a model that looks must now fail. At least two samples."""
    assert len(samples) > 1
    return [replace(sample, images=samples[(i + 1) % len(samples)].images) for i, sample in enumerate(samples)]


def _answer(
    recipe: Recipe,
    runtime: Runtime,
    processor: Processor,
    engine: EmbeddedEngine,
    reward: AnswerReward,
    samples: list[Sample],
    modes: Sequence[Mode],
) -> list[Group]:
    prompts = [Prompt(sample, processor.encode_prompt(sample)) for sample in samples]
    groups = _generate(recipe, runtime, engine, prompts, modes)
    reward.score_groups(groups, processor.tokenizer.decode)
    return groups


def _generate(
    recipe: Recipe, runtime: Runtime, engine: EmbeddedEngine, prompts: Sequence[Prompt], modes: Sequence[Mode]
) -> list[Group]:
    requests = [Request(prompt, mode, 0) for prompt in range(len(prompts)) for mode in modes]
    params = SamplingParams(recipe.evaluate.max_new_tokens or recipe.bpo.max_new_tokens, temperature=0.0)
    samples, encoded = [prompt.sample for prompt in prompts], [prompt.encoded for prompt in prompts]
    return generate_groups(engine, runtime, samples, encoded, requests, params)

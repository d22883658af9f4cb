"""One or two steps of a stage in this process, with what went in and out of them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from r4b_core.config.load import load_recipe
from r4b_core.data.batch import PackedBatch
from r4b_core.data.schema import Sample
from r4b_core.parallel.learner import Learner, StepResult
from r4b_core.parallel.runtime import Runtime
from r4b_core.rewards.reward import AnswerReward, Score
from r4b_core.rollout.types import Group
from r4b_core.stages import anneal, bpo
from r4b_core.stages.job import Job, StopSignal
from r4b_core.telemetry.metrics import read_metrics, without_times
from r4b_core.telemetry.run import RunFolder

BRIEF = (
    "bpo.steps=1",
    "bpo.prompts=3",
    "bpo.group_size=2",
    "bpo.max_new_tokens=8",
    "bpo.probe_every=0",
    "bpo.optim={lr: 0.01}",
    "anneal.batch_size=4",
    "anneal.optim={lr: 0.01}",
)


@dataclass
class Trial:
    """A stage that ran.

    Attributes:
        lines: of metrics.jsonl, without times.
        groups: each step's rollouts.
        batches: each update's micro-batches.
        samples: each annealing step's samples.
        results: of each update.
        weights: the parameters before the first update and after each.
    """

    job: Job
    lines: list[dict[str, Any]] = field(default_factory=list)
    groups: list[list[Group]] = field(default_factory=list)
    batches: list[list[PackedBatch]] = field(default_factory=list)
    samples: list[list[Sample]] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def rollouts(self) -> list[Any]:
        return [rollout for groups in self.groups for group in groups for rollout in group.rollouts]


class Lab:
    """Runs stages on one rank, each in a folder of its own."""

    def __init__(self, ranks: Runtime, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.ranks, self.folder, self.patch = ranks, folder, patch
        self._numbers = itertools.count()

    def job(self, *overrides: str) -> Job:
        recipe = load_recipe("smoke", [*BRIEF, *overrides]).recipe
        run = RunFolder(self.folder / str(next(self._numbers)), console=False)
        run.start(recipe)
        return Job(recipe, self.ranks, run, StopSignal(), None)

    def run(self, stage: Callable[[Job], None], *overrides: str) -> Trial:
        """Run the stage from the recipe's initial weights and watch it."""
        trial = Trial(self.job(*overrides))
        step, pack, pack_samples = Learner.step, bpo.pack, anneal.pack_samples

        def watched_step(learner: Learner, batches: Sequence[PackedBatch], head: Any) -> StepResult:
            if not trial.weights:
                trial.weights.append(copy_of(learner.model))
            trial.batches.append(list(batches))
            trial.results.append(step(learner, batches, head))
            trial.weights.append(copy_of(learner.model))
            return trial.results[-1]

        def watched_pack(job: Job, groups: list[Group], prompts: Any) -> list[PackedBatch]:
            trial.groups.append(groups)
            return pack(job, groups, prompts)

        def watched_samples(job: Job, samples: list[Sample]) -> list[PackedBatch]:
            trial.samples.append(samples)
            return pack_samples(job, samples)

        with self.patch.context() as patch:
            patch.setattr(Learner, "step", watched_step)
            patch.setattr(bpo, "pack", watched_pack)
            patch.setattr(anneal, "pack_samples", watched_samples)
            try:
                stage(trial.job)
            finally:
                trial.job.run.close()
                trial.lines = without_times(read_metrics(trial.job.run.metrics.path))
        return trial

    def bpo(self, *overrides: str) -> Trial:
        return self.run(bpo.bpo, *overrides)

    def anneal(self, *overrides: str) -> Trial:
        return self.run(anneal.anneal, *overrides)

    def reward(self, judge: Callable[[str, str], float]) -> None:
        """From now on the reward of (response, reference) is this one."""

        def score(reward: AnswerReward, responses: Sequence[tuple[str, str, bool]]) -> list[Score]:
            return [Score(judge(text, gold), "test") for text, gold, _ in responses]

        self.patch.setattr(AnswerReward, "score", score)


def coin(text: str, gold: str) -> float:
    """0 or 1, as a hash of the response has it: untrained answers are hardly ever right."""
    return float(zlib.crc32(text.encode()) & 1)


def copy_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

"""Where a run's samples come from: the board task, or files of records. Stages ask here and do not care which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from r4b_core.config.recipe import Recipe
from r4b_core.data import boards
from r4b_core.data.files import TEACHER, RecordFiles
from r4b_core.data.packing import usable_capacity
from r4b_core.data.prompts import Prompt, Prompts, PromptSampler, choose
from r4b_core.data.quarantine import Quarantine
from r4b_core.data.stream import Bad, check_lanes
from r4b_core.models.processor import Processor, processor_of
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.types import Group

FIRST = 1000
SUPERVISED = ("pretrain", "anneal", "distill")
QUARANTINE = "quarantine.jsonl"

T = TypeVar("T")


class Source(Protocol):
    """Questions for reinforcement learning and probes.

    Attributes:
        fingerprint: of the training data: a run goes on with the same alone.
        mathematics: are answers compared as mathematics, or as plain words and numbers?
    """

    processor: Processor
    fingerprint: str
    mathematics: bool

    def draw(self, step: int, attempt: int) -> list[Prompt]:
        """The prompts of a step of reinforcement learning, the same on every rank."""
        ...

    def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        """Take in what a step's groups, scored and with advantages, say about their prompts; values to log."""
        ...

    def probes(self) -> list[Prompt]:
        """Fixed questions that are not trained on."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """What ``draw`` depends on beside its arguments, for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def check_data(recipe: Recipe) -> str:
    """The fingerprint of the training data, which is looked at as far as it can be before anything is launched.

    Raises:
        ValueError: the processor does not fit the model, files are missing or lack columns, a band is empty.
    """
    processor = processor_of(recipe.model, recipe.data)
    if recipe.data.task == "boards":
        return boards.fingerprint(recipe.data, "train")
    files = training_files(recipe)
    for stage in SUPERVISED:
        if files is not None and getattr(recipe, stage).steps:
            check_lanes(getattr(recipe, stage).batch_size, 1, files.rows)
    if files is not None and recipe.bpo.steps:
        sampler_of(recipe, Prompts(files, processor, room(recipe)))
    held_out = held_out_files(recipe)
    if files is not None and held_out is not None:
        both = {file.path.resolve() for file in files.files} & {file.path.resolve() for file in held_out.files}
        if both:
            raise ValueError(
                f"data.held_out_files: {min(both)} is in data.train too, so that its figures would show what was "
                "learned by heart: take it out of one of them"
            )
    return files.fingerprint if files is not None else ""


def training_files(recipe: Recipe) -> RecordFiles | None:
    """The files of ``data.train``, with the columns that the recipe's stages need; None where it names none."""
    if not recipe.data.train:
        return None
    needed = ["response"] if any(getattr(recipe, stage).steps for stage in SUPERVISED) else []
    needed += ["answer"] if recipe.bpo.steps else []
    if recipe.distill.steps and recipe.distill.logit_weight and recipe.distill.teacher is None:
        needed += TEACHER
    return RecordFiles(recipe.data.train, "data.train", needed)


def held_out_files(recipe: Recipe) -> RecordFiles | None:
    if not recipe.data.held_out_files:
        return None
    return RecordFiles(recipe.data.held_out_files, "data.held_out_files", ["answer"])


def room(recipe: Recipe) -> int:
    """Most tokens of a prompt for which ``bpo.max_new_tokens`` are to be left.

    Raises:
        ValueError: there are none.
    """
    capacity = usable_capacity(recipe.packing.capacity, recipe.parallel.tp * recipe.parallel.cp, None)
    if capacity <= recipe.bpo.max_new_tokens:
        raise ValueError(
            f"packing.capacity = {recipe.packing.capacity} leaves no room for a prompt beside bpo.max_new_tokens = "
            f"{recipe.bpo.max_new_tokens}: raise the one or lower the other"
        )
    return capacity - recipe.bpo.max_new_tokens


def sampler_of(recipe: Recipe, prompts: Prompts) -> PromptSampler:
    """
    Raises:
        ValueError: fewer prompts than a step draws, or a band without any.
    """
    if len(prompts) < recipe.bpo.prompts:
        raise ValueError(
            f"bpo.prompts = {recipe.bpo.prompts} and data.train holds {len(prompts)}: lower it, or give more"
        )
    return PromptSampler(prompts.rates(), recipe.bpo.bands, recipe.seed, recipe.bpo.rate_update)


def source_of(recipe: Recipe, processor: Processor, runtime: Runtime, run: Path) -> Source:
    if recipe.data.task == "boards":
        return Boards(recipe, processor)
    return Records(recipe, processor, runtime, run)


class Boards:
    """The board task: questions without end, step n of a stream made from (seed, split, stream, n) alone."""

    mathematics = False
    state: dict[str, Any] = {}

    def __init__(self, recipe: Recipe, processor: Processor) -> None:
        self.recipe, self.processor = recipe, processor
        self.fingerprint = boards.fingerprint(recipe.data, "train")

    def draw(self, step: int, attempt: int) -> list[Prompt]:
        return self._make("train", f"bpo/{attempt}", step, self.recipe.bpo.prompts)

    def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        return {}

    def probes(self) -> list[Prompt]:
        return self._make("held_out", "probe", 0, self.recipe.bpo.probe_prompts)

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def _make(self, split: boards.Split, stream: str, step: int, count: int) -> list[Prompt]:
        recipe = self.recipe
        samples = boards.make_samples(split, recipe.seed, stream, step, count, recipe.bpo.mix, config=recipe.data)
        return [Prompt(sample, self.processor.encode_prompt(sample)) for sample in samples]


class Records:
    """Prompts from files of records, drawn by pass rate."""

    mathematics = True

    def __init__(self, recipe: Recipe, processor: Processor, runtime: Runtime, run: Path) -> None:
        self.recipe, self.processor, self.runtime = recipe, processor, runtime
        self.quarantine = Quarantine(run / QUARANTINE) if runtime.is_main else None
        self.train, self.held_out = training_files(recipe), held_out_files(recipe)
        self.fingerprint = self.train.fingerprint if self.train is not None else ""
        self.tally = Tally(recipe.data.max_bad_share, self.train.rows if self.train is not None else 0)
        self._probes: list[Prompt] | None = None
        self._step, self._drawn = -1, {}
        if self.train is not None and recipe.bpo.steps:
            self._prompts = Prompts(self.train, processor, room(recipe))
            self._sampler = sampler_of(recipe, self._prompts)

    def set_aside(self, bad: Sequence[Bad]) -> None:
        """Write records that cannot be used to quarantine.jsonl; on the main rank, others may call it too."""
        if self.quarantine is not None:
            for record in bad:
                self.quarantine.add(*record)

    def draw(self, step: int, attempt: int) -> list[Prompt]:
        if step != self._step:
            self._step, self._drawn = step, {}
        found: list[Prompt] = []
        count = self.recipe.bpo.prompts
        while len(found) < count:
            places = self._sampler.draw(count - len(found), step, attempt, list(self._drawn.values()))
            read = agreed(self.runtime, lambda places=places: self._prompts.read(places))
            for place, prompt in zip(places, read, strict=True):
                if isinstance(prompt, Bad):
                    self._sampler.drop(place)
                else:
                    prompt.sample.pass_rate = self._sampler.rate(place)
                    self._drawn[prompt.sample.id] = place
                    found.append(prompt)
            bad = [prompt for prompt in read if isinstance(prompt, Bad)]
            self.set_aside(bad)
            self.tally.add(len(read), bad)
            if not places:
                break
        if not found and not attempt:
            raise ValueError(
                "data.train: not one prompt is left that can be drawn; quarantine.jsonl says what is wrong with them"
            )
        return found

    def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        rates = []
        for group in groups:
            place = self._drawn[group.sample.id]
            # A length cost makes a wrong answer's reward negative and leaves a right one's above 0.
            right = sum(rollout.reward > 0 for rollout in group.rollouts) / len(group.rollouts)
            has_signal = any(rollout.advantage != 0 for rollout in group.rollouts)
            self._sampler.learn(place, right, has_signal)
            rates.append(right)
        return {"data/pass_rate": sum(rates) / len(rates)} if rates else {}

    def probes(self) -> list[Prompt]:
        if self._probes is None:
            assert self.held_out is not None, "the recipe asks for probes and names no files"
            prompts = Prompts(self.held_out, self.processor, room(self.recipe))
            places = choose(self.recipe.bpo.probe_prompts, len(prompts), self.recipe.seed)
            read = agreed(self.runtime, lambda: prompts.read(places))
            self.set_aside([prompt for prompt in read if isinstance(prompt, Bad)])
            self._probes = [prompt for prompt in read if isinstance(prompt, Prompt)]
            if not self._probes:
                raise ValueError(
                    f"data.held_out_files: none of the {len(places)} records chosen for probes can be used; "
                    "quarantine.jsonl says why"
                )
        return self._probes

    @property
    def state(self) -> dict[str, Any]:
        return {"prompts": self._sampler.state, "tally": self.tally.state}

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self._sampler.restore(state["prompts"])
            self.tally.restore(state["tally"])


class Tally:
    """Ends a run whose first records are largely unusable: a wrong file, not bad luck.

    Args:
        share: most of the first ``FIRST`` records (of all, where there are fewer) that may be bad.
    """

    def __init__(self, share: float, records: int) -> None:
        self._share, self._first = share, min(FIRST, records)
        self._met = 0
        self._bad: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._bad.total()

    def add(self, met: int, bad: Sequence[Bad]) -> None:
        """
        Raises:
            ValueError: too many of the first records are bad.
        """
        judged = self._met >= self._first
        self._met += met
        self._bad.update(record.reason for record in bad)
        if not judged and self.total > self._share * self._first:
            ((reason, count),) = self._bad.most_common(1)
            raise ValueError(
                f"data.train: {self.total} of the first {self._met} records cannot be used (most often: {reason}, "
                f"{count} times), more than data.max_bad_share = {self._share:g} of {self._first}; quarantine.jsonl "
                "names them all: mend the files, or raise the share"
            )

    @property
    def state(self) -> dict[str, Any]:
        return {"met": self._met, "bad": dict(self._bad)}

    def restore(self, state: dict[str, Any]) -> None:
        self._met, self._bad = state["met"], Counter(state["bad"])


def agreed(runtime: Runtime, work: Callable[[], T]) -> T:
    """``work()``; where it fails on one rank, all ranks raise the same error and none waits for ever. A collective.

    Raises:
        ValueError: with the first rank's reason.
    """
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    said = "" if problem is None else str(problem) or type(problem).__name__
    errors = [said] if runtime.world == 1 else runtime.gather(said)
    if problem is not None and not isinstance(problem, OSError | ValueError | pa.ArrowException):
        raise problem  # ours, not the user's: with its traceback
    if first := next((found for found in errors if found), ""):
        raise ValueError(first) from problem
    return result  # type: ignore[return-value]

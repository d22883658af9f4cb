"""What every stage stands on: the ranks, the model, the run folder, checkpoints and the way back in after a stop."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from r4b_core.config.recipe import OptimConfig, Recipe
from r4b_core.data.boards import fingerprint
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner, StepResult
from r4b_core.parallel.runtime import Runtime
from r4b_core.telemetry.locate import STAGES, ResumePoint, checkpoints, locate
from r4b_core.telemetry.run import RunFolder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state was saved; says how to go on."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag that stages read between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Job:
    """One run of a recipe on this rank.

    Attributes:
        model: this rank's pipeline stage, with the weights that the last stage of training left.
        resume: where the run goes on, or None.
    """

    def __init__(
        self, recipe: Recipe, runtime: Runtime, run: RunFolder, stop: StopSignal, resume: ResumePoint | None
    ) -> None:
        self.recipe, self.runtime, self.run, self.stop, self.resume = recipe, runtime, run, stop, resume
        self.tokenizer = ToyTokenizer()
        self.model = self.new_model()
        if recipe.model.init_from is not None and resume is None:
            path, _ = locate(Path(recipe.model.init_from))
            checkpoint.load_weights(path, [self.model])
        self.fingerprint = fingerprint(recipe.data, "train")

    def new_model(self) -> R4BModel:
        return build_model(self.recipe.model, self.recipe.parallel, self.recipe.seed)

    def is_past(self, stage: str) -> bool:
        """Did the run that is resumed already leave this stage behind?"""
        return self.resume is not None and STAGES.index(self.resume.stage) > STAGES.index(stage)

    def checkpoints(self, stage: str) -> Path:
        return checkpoints(self.run.path, stage)

    def begin(self, stage: str, optim: OptimConfig, steps: int, freeze: Sequence[str] = ()) -> Stage:
        """A learner on a copy of the current weights, at the step where the stage stopped or at its start."""
        model = self.new_model()
        model.load_state_dict(self.model.state_dict())
        self.model = model
        gc.collect()
        learner = Learner([model], self.runtime, optim, total_steps=steps, freeze=freeze)
        return Stage(self, stage, learner, steps)


class Stage:
    """The steps of one stage: numbering, resuming, logging, checkpoints."""

    def __init__(self, job: Job, name: str, learner: Learner, steps: int) -> None:
        self.job, self.name, self.learner, self.steps = job, name, learner, steps
        self.done = 0
        if job.resume is not None and job.resume.stage == name:
            state = checkpoint.load(job.resume.path, learner)
            self._check(state, job.resume.path)
            self.done = state["step"]
        self._started = time.perf_counter()

    def _check(self, state: dict[str, Any], path: Path) -> None:
        if state["fingerprint"] != self.job.fingerprint:
            raise ValueError(
                f"data: {path} was trained on another data set (fingerprint {state['fingerprint'][:12]}, now "
                f"{self.job.fingerprint[:12]}), so its position in the data means nothing here: restore the data and "
                "its settings, or start a new run folder"
            )
        if state["seed"] != self.job.recipe.seed:
            raise ValueError(
                f"seed: {path} was trained with seed {state['seed']} and the recipe says {self.job.recipe.seed}: "
                "resume with the same seed, or start a new run folder"
            )

    def remaining(self) -> Iterator[int]:
        """Step numbers still to do; between two of them the state is saved when it is due or a stop was asked for."""
        job = self.job
        while self.done < self.steps:
            self._started = time.perf_counter()
            yield self.done
            self.done += 1
            stopping = job.runtime.any(job.stop.requested)
            due = self.done % job.recipe.checkpoint.every == 0 or self.done == self.steps
            if due or stopping:
                saved = self.save()
                if stopping and self.done < self.steps:
                    raise Interrupted(self._farewell(saved))

    def _farewell(self, saved: bool) -> str:
        run = self.job.run.path
        state = "the state is saved" if saved else "the state could not be saved, the checkpoint before it stands"
        return (
            f"stopped after {self.name} step {self.done} of {self.steps}; {state}. "
            f"Go on with: r4b train {run / 'recipe.resolved.yaml'} --run {run}"
        )

    def log(self, result: StepResult, values: dict[str, float], tokens: int) -> None:
        """One line of metrics for the step in progress."""
        seconds = time.perf_counter() - self._started
        row: dict[str, Any] = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, **values}
        row["perf/tokens_per_s"] = tokens / max(seconds, 1e-9)
        if result.skipped:
            row["skipped"] = result.reason
        self.job.run.metrics.log(self.name, self.done + 1, row)

    def save(self) -> bool:
        """Publish a checkpoint. A full disk is reported and survived: the run goes on with the checkpoint before."""
        job = self.job
        state = {"stage": self.name, "step": self.done, "fingerprint": job.fingerprint, "seed": job.recipe.seed}
        with job.run.timeline("checkpoint"):
            try:
                checkpoint.save(
                    job.checkpoints(self.name), self.done, self.learner, state, keep=job.recipe.checkpoint.keep
                )
            except checkpoint.CheckpointWriteError as error:
                job.run.metrics.log(self.name, self.done, {"alarm/checkpoint": str(error)})
                return False
        return True


def mean_metrics(result: StepResult) -> dict[str, float]:
    """Per-row means of the sums that a head reports."""
    rows = result.metrics.get("rows", 0.0)
    return {name: total / rows for name, total in result.metrics.items() if name != "rows" and rows}

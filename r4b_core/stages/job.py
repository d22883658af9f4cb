"""What every stage stands on: the ranks, the model, the run folder, checkpoints and the way back in after a stop."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from r4b_core.config.recipe import OptimConfig, Recipe
from r4b_core.data.boards import fingerprint
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner, StepResult
from r4b_core.parallel.runtime import Runtime
from r4b_core.telemetry.locate import STAGES, ResumePoint, checkpoints, locate
from r4b_core.telemetry.run import RECIPE, RunFolder, stage_steps


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state was saved; says how to go on."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag that stages read between steps; a second Ctrl-C stops at once.

    ``quiet`` says nothing when the first one comes.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.requested = False
        self.quiet = quiet
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
        if not self.requested and not self.quiet:
            # Not print(): a handler may interrupt one that is under way.
            os.write(2, b"stopping after this step; Ctrl-C again stops at once, without saving\n")
        self.requested = True


def check_resume(recipe: Recipe, run_dir: Path, point: ResumePoint) -> None:
    """Can the run in ``run_dir`` go on from ``point`` under this recipe? To be asked before anything is written.

    Raises:
        ValueError: another recipe, model, seed or data set, or a stage that is shorter than what was done of it.
    """
    before = yaml.safe_load((run_dir / RECIPE).read_text(encoding="utf-8")) if (run_dir / RECIPE).exists() else {}
    if before.get("name", recipe.name) != recipe.name:
        raise ValueError(
            f"--run {run_dir}: holds a run of the recipe {before['name']}, and this one is {recipe.name}: "
            "give this run a folder of its own"
        )
    now = recipe.model_dump(mode="json")["model"]
    changed = [name for name in ("family", "size", "shape", "dtype") if before.get("model", now)[name] != now[name]]
    if changed:
        raise ValueError(
            f"model.{changed[0]}: {point.path} has {before['model'][changed[0]]!r} and the recipe says "
            f"{now[changed[0]]!r}: resume with the same model, or start a new run folder"
        )
    state = checkpoint.read_state(point.path)
    if state["seed"] != recipe.seed:
        raise ValueError(
            f"seed: {point.path} was trained with seed {state['seed']} and the recipe says {recipe.seed}: "
            "resume with the same seed, or start a new run folder"
        )
    found = fingerprint(recipe.data, "train")
    if state["fingerprint"] != found:
        raise ValueError(
            f"data: {point.path} was trained on another data set (fingerprint {state['fingerprint'][:12]}, now "
            f"{found[:12]}), so its position in the data means nothing here: restore the data and its settings, or "
            "start a new run folder"
        )
    steps = stage_steps(recipe)[point.stage]
    if point.step > steps:
        raise ValueError(
            f"{point.stage}.steps: the recipe asks for {steps} and {point.path} is already past them: ask for "
            f"{point.step} or more, or start a new run folder"
        )


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

    def stop_if_asked(self, where: str, saved: bool = True) -> None:
        """End the run here if Ctrl-C or SIGTERM came. A collective of all ranks.

        Raises:
            Interrupted: saying how to go on.
        """
        if not self.runtime.any(self.stop.requested):
            return
        state = "the state is saved" if saved else "the state could not be saved, the checkpoint before it stands"
        run, launcher = self.run.path, "r4b"
        if self.runtime.world > 1:
            launcher = f"torchrun --nproc-per-node={self.runtime.world} -m r4b_core.cli.main"
        command = f"{launcher} train {shlex.quote(str(run / RECIPE))} --run {shlex.quote(str(run))}"
        raise Interrupted(f"stopped after {where}; {state}. Go on with: {command}")

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
            self.done = checkpoint.load(job.resume.path, learner)["step"]
        self._started = time.perf_counter()

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
                job.stop_if_asked(f"{self.name} step {self.done} of {self.steps}", saved)

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
            job.run.metrics.sync()
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

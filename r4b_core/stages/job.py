"""What every stage stands on: the ranks, the model, the run folder, checkpoints and the way back in after a stop."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from r4b_core.config.recipe import ModelConfig, OptimConfig, Recipe
from r4b_core.data.tokenizer import Tokenizer
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.families import build_model
from r4b_core.models.processor import processor_of
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner, StepResult
from r4b_core.parallel.runtime import Runtime
from r4b_core.stages.source import SUPERVISED, check_data, source_of
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


def check_resume(recipe: Recipe, run_dir: Path, point: ResumePoint, found: str | None = None) -> None:
    """Can the run in ``run_dir`` go on from ``point`` under this recipe? To be asked before anything is written.

    Args:
        found: fingerprint of the recipe's training data, if it is known.

    Raises:
        ValueError: another recipe, model, seed or data set, a stage that is shorter than what was done of it, or
            another number of packed sequences per step in the midst of a stage.
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
    found = check_data(recipe) if found is None else found
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
    lanes = state.get("data", {}).get("lanes", {}) if point.stage in SUPERVISED and point.step < steps else {}
    if lanes and len(lanes) != (asked := getattr(recipe, point.stage).batch_size):
        raise ValueError(
            f"{point.stage}.batch_size: {point.path} holds the position of {len(lanes)} packed sequences and the "
            f"recipe asks for {asked}: go on with as many, or start a new run folder"
        )


class Job:
    """One run of a recipe on this rank.

    Attributes:
        chunks: this rank's pipeline stage (its chunks, where the pipeline is interleaved), with the weights that the
            last stage of training left.
        source: where samples come from.
        resume: where the run goes on, or None.
    """

    def __init__(
        self, recipe: Recipe, runtime: Runtime, run: RunFolder, stop: StopSignal, resume: ResumePoint | None
    ) -> None:
        self.recipe, self.runtime, self.run, self.stop, self.resume = recipe, runtime, run, stop, resume
        self.processor = processor_of(recipe.model, recipe.data)
        self.chunks = self.new_chunks()
        if recipe.model.init_from is not None and resume is None:
            path, _ = locate(Path(recipe.model.init_from))
            checkpoint.load_weights(path, self.chunks)
        self.source = source_of(recipe, self.processor, runtime, run.path)
        self.fingerprint = self.source.fingerprint

    @property
    def model(self) -> DecoderModel:
        """This rank's pipeline stage, where it is one chunk."""
        (model,) = self.chunks
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    def new_chunks(self, model: ModelConfig | None = None) -> list[DecoderModel]:
        """A freshly initialized model of the recipe's layout; ``model`` takes the place of the recipe's."""
        recipe = self.recipe
        chunks = range(recipe.parallel.virtual_stages)
        return [build_model(model or recipe.model, recipe.parallel, recipe.seed, chunk) for chunk in chunks]

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
        chunks = self.new_chunks()
        for chunk, trained in zip(chunks, self.chunks, strict=True):
            chunk.load_state_dict(trained.state_dict())
        self.chunks = chunks
        gc.collect()
        learner = Learner(chunks, self.runtime, optim, total_steps=steps, freeze=freeze)
        return Stage(self, stage, learner, steps)


class Stage:
    """The steps of one stage: numbering, resuming, logging, checkpoints.

    Attributes:
        state: what the checkpoint that the stage goes on from holds beside tensors; {} at the stage's beginning.
    """

    def __init__(self, job: Job, name: str, learner: Learner, steps: int) -> None:
        self.job, self.name, self.learner, self.steps = job, name, learner, steps
        self.state: dict[str, Any] = {}
        self._kept: dict[str, Callable[[], Any]] = {}
        if job.resume is not None and job.resume.stage == name:
            self.state = checkpoint.load(job.resume.path, learner)
        self.done: int = self.state.get("step", 0)
        self._started = time.perf_counter()

    def keep(self, name: str, value: Callable[[], Any]) -> None:
        """From now on checkpoints hold ``value()``, JSON-able and the same on every rank, under ``state[name]``.

        It is called on all ranks together.
        """
        self._kept[name] = value

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
        state |= {name: value() for name, value in self._kept.items()}
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


def packing(job: Job) -> dict[str, Any]:
    """How this job cuts its streams: capacity and divisibility."""
    parallel, packed = job.recipe.parallel, job.recipe.packing
    return {
        "capacity": packed.capacity,
        "multiple": parallel.tp * parallel.cp,
        "pad_to": packed.capacity if packed.static else None,
    }


def mean_metrics(result: StepResult) -> dict[str, float]:
    """Per-row means of the sums that a head reports."""
    rows = result.metrics.get("rows", 0.0)
    return {name: total / rows for name, total in result.metrics.items() if name != "rows" and rows}

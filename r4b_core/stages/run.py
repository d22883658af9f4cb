"""A whole recipe: pre-training, annealing, distillation, evaluation, BPO, evaluation, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from r4b_core.config.load import ResolvedRecipe
from r4b_core.config.recipe import Recipe
from r4b_core.evaluate.suite import evaluate, table_of
from r4b_core.parallel import manifest
from r4b_core.parallel import runtime as parallel_runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.stages.anneal import anneal, pretrain
from r4b_core.stages.bpo import bpo
from r4b_core.stages.distill import check_teacher, distill
from r4b_core.stages.job import Job, StopSignal, check_resume
from r4b_core.stages.source import check_data
from r4b_core.telemetry.files import only_writer, write_atomic
from r4b_core.telemetry.locate import REFERENCE, STAGES, checkpoints, find_resume_point
from r4b_core.telemetry.metrics import read_metrics
from r4b_core.telemetry.report import write_report
from r4b_core.telemetry.run import RunFolder, stage_steps


def run_recipe(resolved: ResolvedRecipe, run_dir: Path, *, resume: str = "auto") -> dict[str, Any]:
    """Run every stage that the recipe names, going on where an earlier start of this run stopped.

    Args:
        resolved: the recipe.
        run_dir: the run folder.
        resume: "auto" continues from the newest complete checkpoint; "never" refuses a folder that holds one.

    Returns:
        The summary, as written to summary.json.

    Raises:
        ValueError: ``resume="never"`` and the folder holds a run; a layout that does not fit; data or a teacher that
            cannot be used; a recipe that the run in the folder cannot go on under; another run at work there.
        Interrupted: after Ctrl-C, once the state is saved.
    """
    recipe, run_dir = resolved.recipe, Path(run_dir)
    found = check_data(recipe)
    check_teacher(recipe)
    with only_writer(run_dir) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _run_alone(recipe, run_dir, resume, found)


def _run_alone(recipe: Recipe, run_dir: Path, resume: str, found: str) -> dict[str, Any]:
    """``found`` is the fingerprint of the training data."""
    point = find_resume_point(run_dir)
    if point is not None and resume == "never":
        raise ValueError(
            f"--run {run_dir}: holds a run (checkpoint {point.path.name}); give a new folder or --resume auto"
        )
    if point is not None:
        check_resume(recipe, run_dir, point, found)
    ranks = parallel_runtime.start(recipe.parallel, seed=recipe.seed)
    try:
        with StopSignal(quiet=not ranks.is_main) as stop, RunFolder(run_dir, active=ranks.is_main) as run:
            if ranks.is_main:
                remove_leftovers(run_dir, recipe.checkpoint.keep)
            run.start(recipe, resumed_at=(point.stage, point.step) if point else None)
            job = Job(recipe, ranks, run, stop, point)
            clock = Clock(run_dir if ranks.is_main else None, fresh=point is None)
            with clock("pretrain"):
                pretrain(job)
            with clock("anneal"):
                anneal(job)
            if recipe.distill.steps:
                with clock("distill"):
                    distill(job)
            before = evaluate_once(job, "distill" if recipe.distill.steps else "anneal", clock)
            job.stop_if_asked("the evaluation before BPO")
            with clock("bpo"):
                bpo(job)
            after = evaluate_once(job, "bpo", clock) if recipe.bpo.steps else before
            summary = {
                "before_bpo": before,
                "after_bpo": after,
                "seconds": clock.seconds,
                "peak_rss_gb": peak_rss_gb(),
            }
            run.write_summary(summary)
        if ranks.is_main:
            write_report(run_dir)
        return summary
    finally:
        ranks.stop()


def remove_leftovers(run_dir: Path, keep: int) -> None:
    """Remove what a killed run left: half-written files and folders, and checkpoints that it had yet to prune."""
    for stage in (*STAGES, REFERENCE):
        manifest.prune(checkpoints(run_dir, stage), keep)
    for folder in (run_dir, run_dir / "rollouts"):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def evaluate_once(job: Job, stage: str, clock: Clock) -> dict[str, Any]:
    """Evaluate the current weights, those at the end of ``stage``; or read what an earlier start of this run found.

    A recipe of records without held-out files has nothing to evaluate on: {}.

    metrics.jsonl is the only record: it is cut back to the checkpoint that a run goes on from, so an evaluation that
    is still in it is one of these weights.

    Raises:
        ValueError: the evaluation before BPO is missing from a run that is past it, whose weights are gone.
    """
    if job.recipe.data.task == "records" and not job.recipe.data.held_out_files:
        return {}
    step = stage_steps(job.recipe)[stage]
    known = None
    if job.runtime.is_main and job.resume is not None:
        lines = read_metrics(job.run.metrics.path)
        tables = [table_of(line) for line in lines if (line["stage"], line["step"]) == (stage, step)]
        known = next((table for table in tables if table is not None), None)
    known = job.runtime.broadcast_object(known)
    if known is not None:
        return known
    if job.is_past(stage):
        raise ValueError(
            f"{job.run.metrics.path}: the evaluation at {stage} step {step} is missing, and the run is past it: "
            f"restore the file and {stage}.steps, or start a new run folder"
        )
    with clock("evaluate"), job.run.timeline("evaluate"):
        engine = EmbeddedEngine(
            job.chunks, job.tokenizer.mode_tokens, job.tokenizer.vocab_size, job.recipe.evaluate.batch
        )
        evaluation = evaluate(job.recipe, job.runtime, job.processor, engine)
    job.run.metrics.log(stage, step, evaluation.metrics())
    return evaluation.table()


class Clock:
    """Seconds per stage, kept in the run folder so that a resumed run adds to them."""

    def __init__(self, run_dir: Path | None, fresh: bool) -> None:
        self.path = run_dir / "seconds.json" if run_dir is not None else None
        self.seconds: dict[str, float] = {}
        if self.path is not None and self.path.exists() and not fresh:
            self.seconds = json.loads(self.path.read_text())

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 2)
            if self.path is not None:
                write_atomic(self.path, json.dumps(self.seconds) + "\n")


def peak_rss_gb() -> float:
    """Most resident memory that this process has had, in gigabytes (1e9 bytes)."""
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)
    if peak is None:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 1e9, 3)

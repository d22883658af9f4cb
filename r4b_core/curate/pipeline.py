"""The stages of a recipe in a run folder: each reads what the one before it wrote.

r4b curate run RECIPE --run DIR    DIR/1-standardize, DIR/2-generate, DIR/3-verify, DIR/4-score, DIR/5-select
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from r4b_core.config.load import RecipeError, Resolved, dump_resolved
from r4b_core.curate.progress import progress
from r4b_core.curate.ray_runner import run_stage_on_ray
from r4b_core.curate.recipe import (
    CurateRecipe,
    StageName,
    input_folder,
    models_without_endpoints,
    stage_folders,
)
from r4b_core.curate.runner import Advance, RecordWork, Work, run_stage
from r4b_core.curate.stage import Stage
from r4b_core.curate.store import (
    Counts,
    Partition,
    StageError,
    StageStore,
    folder_counts,
    open_stage,
    partitions_of,
    record_files,
    write_whole,
)

RESOLVED = "recipe.resolved.yaml"
JUDGEMENTS = "judgements.jsonl"
JUDGED_BATCH = 1024


@dataclass(frozen=True)
class Job:
    """How stages are run.

    Attributes:
        recipe: of all of them.
        run: the run folder.
        ray: address of a Ray cluster, or None for this machine's processes.
        force: do a stage again where its settings or its input changed.
    """

    recipe: CurateRecipe
    run: Path
    ray: str | None = None
    force: bool = False

    def do(self, store: StageStore, work: Work, advance: Advance = lambda n: None) -> None:
        """Do the partitions of a store that are not finished: here or on Ray, with the same bytes."""
        if self.ray is not None:
            run_stage_on_ray(store, work, self.ray, advance)
        else:
            run_stage(store, work, self.recipe.workers, advance)


def run_stages(resolved: Resolved[CurateRecipe], job: Job, told: Callable[[StageName, Counts], None]) -> None:
    """Every stage of the recipe, in order.

    Args:
        told: is given each stage's counts when it is done.

    Raises:
        RecipeError: a stage that is not finished needs a model that no endpoint serves.
        ValueError: see `run_one`.
    """
    folders = stage_folders(job.recipe, job.run)
    open_stages = [stage for stage, folder in folders.items() if job.force or not _is_finished(folder)]
    if missing := models_without_endpoints(job.recipe, open_stages):
        raise RecipeError(job.recipe.name, missing)
    for stage in stage_folders(job.recipe, job.run):
        told(stage, run_one(resolved, job, stage))


def run_one(resolved: Resolved[CurateRecipe], job: Job, stage: StageName) -> Counts:
    """One stage, from where it stopped.

    Raises:
        ValueError: the recipe leaves it out, its input is not finished, or settings or input changed since it began.
    """
    folder = stage_folders(job.recipe, job.run).get(stage)
    if folder is None:
        input_folder(job.recipe, job.run, stage)  # says so
        raise AssertionError
    job.run.mkdir(parents=True, exist_ok=True)
    write_whole(job.run / RESOLVED, dump_resolved(resolved))
    with progress(stage, None if stage == "standardize" else _num_records(job, stage)) as advance:
        return _STAGES[stage](job, folder, advance)


def _standardize(job: Job, folder: Path, advance: Advance) -> Counts:
    from r4b_core.curate.standardize.rewrite import Rewriting
    from r4b_core.curate.standardize.run import standardize

    recipe = job.recipe
    rewriter = Rewriting(recipe.rewrite) if recipe.rewrite.cleaner.endpoints else None
    return standardize(folder, recipe.inputs, recipe.standardize, job.do, advance, rewriter=rewriter, force=job.force)


def _generate(job: Job, folder: Path, advance: Advance) -> Counts:
    from r4b_core.curate.generate import open_generate

    settings = job.recipe.generate
    return _ask(job, "generate", folder, open_generate, settings, settings.content, advance)


def _verify(job: Job, folder: Path, advance: Advance) -> Counts:
    from r4b_core.curate.client import open_chat
    from r4b_core.curate.judging import judge_by
    from r4b_core.curate.verify import VerifySettings, open_verify

    settings, model = job.recipe.verify, job.recipe.judge
    asked = {"verify": settings.content, "judge": model.content if model.endpoints else None}
    with open_stage(folder, "verify", asked, _input(job, "verify"), force=job.force) as store:
        if not model.endpoints:
            job.do(store, RecordWork(open_verify, settings), advance)
        elif store.pending():
            # What the rules leave over waits for the judge: one process keeps a whole batch under way.
            with open_chat(model, "judge", folder / JUDGEMENTS) as chat:

                def with_judge(settings: VerifySettings) -> AbstractContextManager[Stage]:
                    return open_verify(settings, judge_by(chat))

                run_stage(store, RecordWork(with_judge, settings, JUDGED_BATCH), 0, advance)
        return store.counts()


def _score(job: Job, folder: Path, advance: Advance) -> Counts:
    from r4b_core.curate.score import open_score

    settings, judge = job.recipe.score, job.recipe.judge
    asked = {"score": settings.content, "judge": judge.content if judge.endpoints else None}
    return _ask(job, "score", folder, partial(open_score, judge=judge), settings, asked, advance)


def _select(job: Job, folder: Path, advance: Advance) -> Counts:
    from r4b_core.curate.select import select

    source = input_folder(job.recipe, job.run, "select")
    return select(folder, source, job.recipe.select, job.recipe.seed, job.do, advance, force=job.force)


def _ask(
    job: Job, stage: StageName, folder: Path, make: Any, settings: Any, asked: dict[str, Any], advance: Advance
) -> Counts:
    """A stage that waits for endpoints: one process keeps thousands of requests under way, on Ray or not."""
    from r4b_core.curate.asking import AskWork

    partitions = _input(job, stage)
    with open_stage(folder, stage, asked, partitions, force=job.force) as store:
        run_stage(store, AskWork(make, settings, folder, tuple(store.pending())), 0, advance)
        return store.counts()


def _is_finished(folder: Path) -> bool:
    try:
        return bool(record_files(folder))
    except StageError:
        return False


def _input(job: Job, stage: StageName) -> list[Partition]:
    return partitions_of(input_folder(job.recipe, job.run, stage))


def _num_records(job: Job, stage: StageName) -> int:
    """Records that the stage has still to do."""
    folder = stage_folders(job.recipe, job.run)[stage]
    total = sum(pq.read_metadata(partition.path).num_rows for partition in _input(job, stage))
    return max(0, total - folder_counts(folder).read) if folder.is_dir() and not job.force else total


_STAGES: dict[StageName, Callable[[Job, Path, Advance], Counts]] = {
    "standardize": _standardize,
    "generate": _generate,
    "verify": _verify,
    "score": _score,
    "select": _select,
}

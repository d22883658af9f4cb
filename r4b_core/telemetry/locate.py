"""Where a run keeps its checkpoints, and which one is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r4b_core.config.recipe import Recipe
from r4b_core.parallel import checkpoint
from r4b_core.telemetry.run import RECIPE, stage_steps

STAGES = ("pretrain", "anneal", "distill", "bpo")
REFERENCE = "reference"


@dataclass(frozen=True)
class ResumePoint:
    """The newest complete checkpoint of a run."""

    stage: str
    step: int
    path: Path


def checkpoints(run: Path, stage: str) -> Path:
    """The folder of a stage's ``step_*`` checkpoints."""
    return run / "checkpoints" / stage


def find_resume_point(run: Path) -> ResumePoint | None:
    """The newest complete checkpoint: of the last stage that has one."""
    for stage in reversed(STAGES):
        path = checkpoint.latest(checkpoints(run, stage))
        if path is not None:
            return ResumePoint(stage, checkpoint.read_state(path)["step"], path)
    return None


def locate(path: Path) -> tuple[Path, Path]:
    """(checkpoint folder, recipe file) for a run folder or a checkpoint within one.

    Raises:
        ValueError: if there is neither, or the run has no complete checkpoint yet.
    """
    if (path / RECIPE).is_file():
        point = find_resume_point(path)
        if point is None:
            raise ValueError(
                f"{path}: no complete checkpoint yet; train it with: r4b train {path / RECIPE} --run {path}"
            )
        return point.path, path / RECIPE
    recipe = path.parent.parent.parent / RECIPE
    if path.is_dir() and recipe.is_file():
        return path, recipe
    raise ValueError(f"{path}: neither a run folder nor a checkpoint in one (RUN/checkpoints/STAGE/step_*)")


def finished_at(recipe: Recipe, run_dir: Path) -> str | None:
    """The stage and step that a run in this folder ended with; None where something is left to train, or nothing."""
    point = find_resume_point(run_dir)
    stages = [(stage, steps) for stage, steps in stage_steps(recipe).items() if steps]
    if point is None or not stages or (point.stage, point.step) != stages[-1]:
        return None
    return f"{point.stage} step {point.step}"

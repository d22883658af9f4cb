"""`r4b train`: run a recipe's stages in a run folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from r4b_core.cli.arguments import Overrides, RecipeName

RUN_HELP = "The run folder; write --run-dir under torchrun, which takes --run for its own. (default: runs/NAME)"


class Resume(StrEnum):
    auto = "auto"
    never = "never"


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", "--run-dir", help=RUN_HELP)] = None,
    resume: Annotated[
        Resume, typer.Option(help="auto goes on from the newest complete checkpoint; never wants a new folder.")
    ] = Resume.auto,
) -> None:
    """Run a recipe: pre-training, bi-mode annealing, distillation, BPO or its baselines, evaluation.

    On several GPUs: torchrun --nproc-per-node=8 -m r4b_core.cli.main train RECIPE
    """
    from r4b_core.cli.layout import fit
    from r4b_core.cli.output import say
    from r4b_core.config.layout import world_size_from_environment
    from r4b_core.config.load import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    fit(resolved.recipe, world_size_from_environment())

    from r4b_core.stages.run import run_recipe
    from r4b_core.telemetry.locate import finished_at

    folder = run or Path("runs") / resolved.recipe.name
    if (done := finished_at(resolved.recipe, folder)) is not None:
        say(f"{folder}: finished at {done}; nothing is left to train: raise its steps, or give a new --run folder")
    run_recipe(resolved, folder, resume=resume.value)
    say(f"report: {folder / 'report.html'}")

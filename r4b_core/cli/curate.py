"""`r4b curate`: the data engine, a stage at a time or all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r4b_core.cli.arguments import Overrides
from r4b_core.cli.show import AsYaml, Changed, print_recipe

if TYPE_CHECKING:
    from r4b_core.config.load import Resolved
    from r4b_core.curate.pipeline import Job
    from r4b_core.curate.recipe import CurateRecipe, StageName
    from r4b_core.curate.store import Counts

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (mmfr-123k).")
]
Run = Annotated[Path | None, typer.Option("--run", help="The run folder. (default: runs/NAME)")]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster; local starts one here.")
]
Force = Annotated[bool, typer.Option("--force", help="Do it again where settings or input changed.")]

app = typer.Typer(
    no_args_is_help=True,
    help="Make training data: collect and clean, ask a teacher, verify, score by difficulty, select.",
)


@app.command()
def standardize(
    recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False
) -> None:
    """Read raw files into clean, checked, unique records."""
    _stage("standardize", recipe, overrides, run, ray, force)


@app.command()
def generate(
    recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False
) -> None:
    """Ask a teacher for a reasoned response to each record."""
    _stage("generate", recipe, overrides, run, ray, force)


@app.command()
def verify(recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False) -> None:
    """Check the form of responses and compare their answers with the reference."""
    _stage("verify", recipe, overrides, run, ray, force)


@app.command()
def score(recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False) -> None:
    """Count how many of a student's tries are right."""
    _stage("score", recipe, overrides, run, ray, force)


@app.command()
def select(recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False) -> None:
    """Choose by difficulty, and give each record its mode."""
    _stage("select", recipe, overrides, run, ray, force)


@app.command("run")
def run_all(
    recipe: Recipe, overrides: Overrides = None, run: Run = None, ray: Ray = None, force: Force = False
) -> None:
    """All stages of the recipe, each from where it stopped, and the page about them."""
    from r4b_core.cli.output import say
    from r4b_core.curate.pipeline import run_stages
    from r4b_core.curate.stats.page import write_stats

    resolved, job = _job(recipe, overrides, run, ray, force)
    left: list[int] = []

    def tell(stage: StageName, counts: Counts) -> None:
        _tell(stage, counts)
        left.append(counts.num_kept)

    run_stages(resolved, job, tell)
    say(f"page: {write_stats(job.run)}")
    if not left[-1]:
        say("no record is left: the reasons above say where they went")
        raise typer.Exit(1)


@app.command()
def show(recipe: Recipe, overrides: Overrides = None, changed: Changed = False, as_yaml: AsYaml = False) -> None:
    """Show the complete recipe and where each value came from."""
    from r4b_core.curate.recipe import load_curate_recipe

    print_recipe(load_curate_recipe(recipe, overrides or ()), changed, as_yaml)


@app.command()
def demo(
    run: Annotated[Path, typer.Option("--run", help="The run folder.")] = Path("runs/curate-demo"),
) -> None:
    """All stages on two thousand rows about real pictures, against stand-in models; nothing else is needed.

    Faults are planted in the rows and in the servers: the command says whether each was found, and fails where not.
    """
    from r4b_core.cli.output import say
    from r4b_core.curate.demo.run import run_demo

    result = run_demo(run, _tell)
    sent, answered = result.requests["sent"], result.requests["finished"]
    say(f"stand-ins: {sent:,} requests, {sent - answered:,} of them failed on purpose, the others answered")
    for difference in result.differences:
        say(f"not as planned: {difference}")
    if result.differences:
        raise typer.Exit(1)
    say("every planted fault was found: the funnel equals the plan")
    say(f"page: {result.page}")
    say(f"train on it: r4b train {result.train}")


@app.command()
def stats(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `r4b curate`.")]) -> None:
    """Write the page about a run: funnel, reasons, lengths, pass rates, samples."""
    from r4b_core.cli.output import say
    from r4b_core.curate.stats.page import write_stats

    say(str(write_stats(run)))


def _stage(
    stage: StageName, recipe: str, overrides: list[str] | None, run: Path | None, ray: str | None, force: bool
) -> None:
    from r4b_core.curate.pipeline import run_one

    resolved, job = _job(recipe, overrides, run, ray, force)
    _tell(stage, run_one(resolved, job, stage))


def _job(
    recipe: str, overrides: list[str] | None, run: Path | None, ray: str | None, force: bool
) -> tuple[Resolved[CurateRecipe], Job]:
    from r4b_core.curate.pipeline import Job
    from r4b_core.curate.recipe import load_curate_recipe

    resolved = load_curate_recipe(recipe, overrides or ())
    folder = run or Path("runs") / resolved.recipe.name
    return resolved, Job(resolved.recipe, folder.absolute() if ray else folder, ray, force)  # nodes start elsewhere


def _tell(stage: StageName, counts: Counts) -> None:
    """What became of a stage's records, and why the others did not go on."""
    from r4b_core.cli.output import say

    dropped, quarantined = counts.dropped.total(), counts.quarantined.total()
    say(f"{stage}: {counts.read:,} in, {counts.num_kept:,} kept, {dropped:,} dropped, {quarantined:,} quarantined")
    for title, table in (("dropped", counts.dropped), ("quarantined", counts.quarantined)):
        reasons: dict[str, int] = {}
        for (_, reason), count in table.items():
            reasons[reason] = reasons.get(reason, 0) + count
        for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])):
            say(f"  {title:<11} {count:>9,}  {reason}")

"""The page itself: it opens from a disk, loads nothing, and escapes whatever it quotes."""

from __future__ import annotations

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from r4b_core.curate.stats.collect import collect
from r4b_core.curate.stats.samples import collect_samples
from r4b_core.telemetry.environment import now
from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.report import script_json

PAGE = "stats.html"


def write_stats(run: str | Path) -> Path:
    """Write ``stats.html`` into the run folder of `r4b curate` and return its path.

    Raises:
        ValueError: if no stage has written anything there.
    """
    run = Path(run)
    figures = collect(run)
    first, last = figures.stages[0], figures.stages[-1]
    page = (
        _environment()
        .get_template("stats.html.j2")
        .render(
            name=run.name,
            figures=figures,
            read=first.counts.read,
            kept=last.counts.num_kept,
            widest=max(1, *(stage.counts.read for stage in figures.stages)),
            written=now(),
            data=Markup(script_json({"samples": collect_samples(figures.stages)})),
        )
    )
    path = run / PAGE
    write_atomic(path, page)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("r4b_core.curate.stats", "templates"), PackageLoader("r4b_core.telemetry", "templates")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}".replace(",", " ")
    environment.filters["share"] = lambda part, whole: f"{100 * part / whole:.1f} %" if whole else "–"
    return environment

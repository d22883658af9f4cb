"""`r4b report`: write a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write report.html of a run, finished or still going."""
    from r4b_core.cli.output import say
    from r4b_core.telemetry.report import write_report

    say(str(write_report(run)))

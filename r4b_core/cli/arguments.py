"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (demo).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as bpo.steps=10.")
]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints/step_* folders.")
]

"""`r4b generate`: ask a trained model about an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r4b_core.cli.arguments import RunOrCheckpoint
from r4b_core.modes import Mode


def generate(
    run: RunOrCheckpoint,
    image: Annotated[Path, typer.Option(help="A PNG, JPEG or WEBP file.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    mode: Annotated[Mode, typer.Option(help="Force a mode, or let the model decide.")] = Mode.AUTO,
) -> None:
    """Answer a question about an image."""
    from r4b_core.cli.output import say
    from r4b_core.evaluate.generate import generate as answer

    say(str(answer(run, image=image, prompt=prompt, mode=mode)))

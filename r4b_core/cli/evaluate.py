"""`r4b eval`: accuracy, thinking rate and tokens of a trained model on held-out items."""

from __future__ import annotations

from typing import Annotated

import typer

from r4b_core.cli.arguments import RunOrCheckpoint


def evaluate(
    run: RunOrCheckpoint,
    items: Annotated[int | None, typer.Option(min=2, help="Items per family and mode. (default: the recipe's)")] = None,
) -> None:
    """Evaluate a trained model in all three modes."""
    from r4b_core.evaluate.run import evaluate_run

    evaluate_run(run, items=items)

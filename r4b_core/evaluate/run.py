"""Evaluate a trained model and print the table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from r4b_core.evaluate.load import trained_model
from r4b_core.evaluate.suite import Evaluation, evaluate


def evaluate_run(run: Path, *, items: int | None = None) -> Evaluation:
    """Evaluate the newest checkpoint of ``run`` on held-out items, in all three modes."""
    with trained_model(run) as trained:
        recipe = trained.recipe
        if items is not None:
            recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"items": items})})
        evaluation = evaluate(recipe, trained.runtime, trained.tokenizer, trained.engine)
        Console(quiet=not trained.runtime.is_main).print(
            evaluation_table(evaluation, f"{trained.path}, {recipe.evaluate.items} items per family")
        )
    return evaluation


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    table = Table("family", "mode", "accuracy", "tokens", "thinking rate", "p(think)", title=title)
    for family, modes in evaluation.cells.items():
        for mode, cell in modes.items():
            table.add_row(
                family,
                mode,
                f"{cell.accuracy:.3f}",
                f"{cell.mean_tokens:.1f}",
                f"{cell.thinking_rate:.2f}",
                f"{cell.thinking_probability:.2f}",
            )
        table.add_row(family, "auto, wrong images", f"{evaluation.shuffled[family]:.3f}", "", "", "", style="dim")
    return table

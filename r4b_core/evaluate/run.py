"""Evaluate a trained model and print the table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from r4b_core.evaluate.load import trained_model
from r4b_core.evaluate.suite import Evaluation, evaluate
from r4b_core.models.processor import processor_of


def evaluate_run(run: Path, *, items: int | None = None) -> Evaluation:
    """Evaluate the newest checkpoint of ``run`` on held-out items, in all three modes."""
    with trained_model(run) as trained:
        recipe = trained.recipe
        if items is not None:
            recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"items": items})})
        evaluation = evaluate(recipe, trained.runtime, processor_of(recipe.model, recipe.data), trained.engine)
        how_many = "items per family" if recipe.data.task == "boards" else "records at most"
        title = f"{trained.path}, {recipe.evaluate.items} {how_many}"
        Console(quiet=not trained.runtime.is_main).print(evaluation_table(evaluation, title))
    return evaluation


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    table = Table("family", "mode", "accuracy", "tokens", "thinks", "p(think)", "cut", title=title)
    for family, modes in evaluation.cells.items():
        for mode, cell in modes.items():
            table.add_row(
                family,
                mode,
                f"{cell.accuracy:.3f}",
                f"{cell.mean_tokens:.1f}",
                f"{cell.thinking_rate:.2f}",
                f"{cell.thinking_probability:.2f}",
                f"{cell.truncation:.2f}",
            )
        if family in evaluation.shuffled:
            wrong = f"{evaluation.shuffled[family]:.3f}"
            table.add_row(family, "auto, wrong images", wrong, *[""] * 4, style="dim")
    return table

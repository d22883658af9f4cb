"""The laptop demo: train a small model that learns when to think, show what changed; and the honest comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from r4b_core.config.load import ResolvedRecipe, load_recipe
from r4b_core.stages.run import run_recipe
from r4b_core.telemetry.files import write_atomic

COMPARE_SEEDS = (0, 1, 2)
STARTS = {
    "A": ("annealed", ()),
    "D": ("thinking nearly dead", ("anneal.tail=direct",)),
    "R": ("direct nearly dead", ("anneal.tail=thinking",)),
}
ALGORITHMS = ("bpo", "grpo")


def run_demo(run: Path, *, seed: int = 0, compare: bool = False) -> dict[str, Any]:
    """Pre-train, anneal, BPO, evaluate and report the demo recipe in ``run``.

    A finished demo in that folder is replaced; an unfinished one goes on where it stopped.

    Returns:
        summary.json's content.

    Raises:
        ValueError: if ``run`` is a folder of something else.
    """
    # A second thread gains nothing at this size, and with one the figures do not depend on the number of cores.
    torch.set_num_threads(1)
    resolved = load_recipe("demo", [f"seed={seed}"])
    make_room(run, resolved)
    summary = run_recipe(resolved, run)
    console = Console()
    console.print(summary_table(summary))
    console.print(f"{sum(summary['seconds'].values()):.0f} s, {summary['peak_rss_gb']:.2f} GB at most")
    console.print(f"report: {run / 'report.html'}", soft_wrap=True)
    if compare:
        rows = run_compare(run.with_name(f"{run.name}-compare"))
        console.print(compare_table(rows))
    return summary


def make_room(run: Path, resolved: ResolvedRecipe) -> None:
    """Remove a finished run of the same name, so that the same command shows the same thing again."""
    if not run.exists() or not any(run.iterdir()):
        return
    recipe_file = run / "recipe.resolved.yaml"
    named = recipe_file.is_file() and f"name: {resolved.recipe.name}" in recipe_file.read_text().splitlines()
    if not named:
        raise ValueError(f"--run {run}: holds something other than a {resolved.recipe.name} run; name another folder")
    if (run / "summary.json").exists():
        shutil.rmtree(run)


def summary_table(summary: dict[str, Any]) -> Table:
    """Family x mode, before and after BPO."""
    table = Table(title="accuracy / mean tokens / thinking rate on held-out boards")
    for heading in ("family", "mode", "before BPO", "after BPO"):
        table.add_column(heading)
    for family, modes in summary["before_bpo"].items():
        for mode in modes:
            cells = [summary[when][family][mode] for when in ("before_bpo", "after_bpo")]
            shown = [f"{c['accuracy']:.3f} / {c['mean_tokens']:4.1f} / {c['thinking_rate']:.2f}" for c in cells]
            table.add_row(family, mode, *shown, style="bold" if mode == "auto" else None)
    return table


@dataclass(frozen=True)
class CompareRow:
    """One run of the comparison: where it started, what trained it, and the auto mode after it."""

    start: str
    algorithm: str
    seed: int
    before: dict[str, Any]
    after: dict[str, Any]


def run_compare(folder: Path) -> list[CompareRow]:
    """BPO and free-choice GRPO, everything else equal, from a healthy start and from two where one mode nearly died.

    Each seed pre-trains and anneals once; the starts are short tails of it. Finished runs are not repeated. Writes
    compare.json.
    """
    rows = []
    for seed in COMPARE_SEEDS:
        base = folder / f"seed{seed}-annealed"
        once(base, [f"seed={seed}", "bpo.steps=0"])
        for start, (_, tail) in STARTS.items():
            for algorithm in ALGORITHMS:
                path = folder / f"seed{seed}-{start}-{algorithm}"
                settings = [f"seed={seed}", f"model.init_from={base}", "pretrain.steps=0", "anneal.steps=0", *tail]
                summary = once(path, [*settings, *algorithm_settings(algorithm)])
                rows.append(CompareRow(start, algorithm, seed, summary["before_bpo"], summary["after_bpo"]))
    write_atomic(folder / "compare.json", json.dumps([vars(row) for row in rows], indent=2) + "\n")
    return rows


def algorithm_settings(algorithm: str) -> list[str]:
    """The demo's BPO settings with only the rollouts' freedom changed; no emphasis on the decision token."""
    free = ["bpo.rollouts=free"] if algorithm == "grpo" else []
    return ["bpo.mode_token_weight=1", *free]


def once(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the demo recipe with overrides in ``path`` unless it is finished; its summary."""
    if (path / "summary.json").exists():
        return json.loads((path / "summary.json").read_text())
    return run_recipe(load_recipe("demo", overrides), path)


def compare_table(rows: list[CompareRow]) -> Table:
    """Auto mode after RL: accuracy and thinking rate on hard and easy boards, mean over seeds and each seed's value."""
    table = Table(title="auto mode after RL, mean over seeds (each seed)")
    for heading in ("start", "algorithm", "hard accuracy", "hard thinking", "easy accuracy", "easy thinking"):
        table.add_column(heading)
    for start, (meaning, _) in STARTS.items():
        for algorithm in ALGORITHMS:
            mine = [row for row in rows if row.start == start and row.algorithm == algorithm]
            cells = [
                _cell([row.after[family]["auto"][figure] for row in mine])
                for family in ("hard", "easy")
                for figure in ("accuracy", "thinking_rate")
            ]
            table.add_row(f"{start}: {meaning}", algorithm, *cells)
    return table


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"

"""`r4b demo`: the whole flow on a laptop, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same report.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run BPO and GRPO from a model that has forgotten how to think.")
    ] = False,
    run: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Teach a small model when to think, without a GPU, and write a report."""
    from r4b_core.stages.demo import run_demo

    run_demo(run, seed=seed, compare=compare)

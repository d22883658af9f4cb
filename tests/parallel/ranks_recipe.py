"""A whole recipe (pre-training, annealing, BPO, evaluation) under every layout of two ranks gives one rank's numbers.

Rollouts are drawn anew in each layout, so this also covers that they are the same. The reference is one rank's run,
written before the launch to R4B_TEST_SHARED.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from r4b_core.config.load import load_recipe
from r4b_core.stages.run import run_recipe
from r4b_core.telemetry.metrics import read_metrics
from tests.parallel.harness import Layout
from tests.parallel.ranks_model import TWO_RANKS

# The model is too young to be right, so a length cost gives BPO its rewards; Adam magnifies the rounding of near-zero
# gradients, so the recipe is short.
OVERRIDES = [
    "bpo.length_cost=0.5",
    "bpo.steps=2",
    "telemetry.rollouts_every=100",
    "checkpoint.every=100",
    "evaluate.items=4",
    "bpo.probe_every=0",
    "model.shape.num_layers=4",
]
LAYOUTS = {**TWO_RANKS, "pp2_v2_full": Layout(pp=2, virtual_stages=2, recompute="full")}
COMPARED = ("loss", "grad_norm", "reward/mean", "response_length/mean", "entropy", "kl")


def overrides_of(name: str) -> list[str]:
    layout = LAYOUTS[name]
    sizes = [f"parallel.{key}={getattr(layout, key)}" for key in ("tp", "pp", "cp", "virtual_stages", "recompute")]
    return [*OVERRIDES, *sizes, f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}"]


def curves(run: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(stage, step, compared figures) of every training line."""
    return [
        (row["stage"], row["step"], {name: row[name] for name in COMPARED if name in row})
        for row in read_metrics(run / "metrics.jsonl")
        if "loss" in row
    ]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_recipe_gives_the_curves_of_one_rank(name: str) -> None:
    shared = Path(os.environ["R4B_TEST_SHARED"])
    run_recipe(load_recipe("smoke", overrides_of(name)), shared / name)
    if os.environ["RANK"] != "0":
        return
    for (stage, step, one), (other_stage, other_step, many) in zip(
        curves(shared / "one"), curves(shared / name), strict=True
    ):
        assert (stage, step) == (other_stage, other_step)
        for figure, value in one.items():
            assert many[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name}: {stage} step {step} {figure}"

"""The small recipe, and what of a run folder must repeat bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from r4b_core.parallel import checkpoint, manifest
from r4b_core.telemetry.metrics import read_metrics, without_times

SMALL = (
    "smoke",
    "pretrain.steps=4",
    "anneal.steps=15",
    "anneal.batch_size=32",
    "anneal.mix={read: 0.5, count: 0.5}",
    "anneal.optim={lr: 0.005, warmup_steps: 0}",
    "bpo.steps=4",
    "bpo.prompts=4",
    "bpo.group_size=4",
    "bpo.max_new_tokens=8",
    "bpo.probe_prompts=2",
    "bpo.mix={read: 0.5, count: 0.5}",
    "evaluate.items=2",
    "checkpoint={every: 3, keep: 1}",
)
"""Pre-training of 4 steps, annealing of 15, BPO of 4; a checkpoint after every third step and each stage's last.

Annealing is just long enough to teach the form of an answer, so that some rewards are 1 and some are 0.
"""


def lines(run: Path) -> list[dict[str, Any]]:
    return without_times(read_metrics(run / "metrics.jsonl"))


def rollouts(run: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((run / "rollouts").glob("*"))}


def figures(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {name: summary[name] for name in ("before_bpo", "after_bpo")}


def weights(run: Path, stage: str = "bpo") -> str:
    """A digest of the tensors of the newest checkpoint: parameters and optimizer."""
    path = checkpoint.latest(run / "checkpoints" / stage)
    assert path is not None
    return hashlib.sha256((path / "__0_0.distcp").read_bytes()).hexdigest()


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def outcome(run: Path) -> dict[str, Any]:
    """Everything that two runs of one recipe have in common, however often one of them was stopped."""
    stages = ("pretrain", "anneal", "reference", "bpo")
    return {
        "metrics": lines(run),
        "rollouts": rollouts(run),
        "figures": figures(run),
        "weights": {stage: weights(run, stage) for stage in stages},
        "files": files(run),
    }


def damage(run: Path) -> list[str]:
    """What is wrong with the checkpoints that a start would take for complete ones."""
    published = [path for path in run.glob("checkpoints/*/*") if manifest.step_of(path) is not None]
    return [found for path in published if (found := manifest.find_damage(path, manifest.read(path)))]

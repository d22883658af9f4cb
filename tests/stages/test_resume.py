"""kill -9 at any place, start again with the same command: the run is bit for bit the one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.fork_server import ForkServer
from tests.stages.runs import SMALL, damage, lines, outcome, rollouts

UPDATE = "r4b_core.parallel.optimizer:clip_gradients"
DECODE = "r4b_core.rollout.engine:EmbeddedEngine.decode"
LOG = "r4b_core.telemetry.metrics:Metrics.log"
RENAMED = r"/step_\d+'\)\)$"

# One run is killed at each place in turn. The calls are counted from the start that the kill before made necessary.
PLACES: dict[str, list[dict[str, Any]]] = {
    "a pre-training update": [{"at": UPDATE, "nth": 2}],
    "the files of the first checkpoint": [{"at": "pathlib:Path.write_bytes", "match": "common.pt"}],
    "before the first checkpoint is published": [{"at": "os:rename", "match": RENAMED}],
    "before the one that it replaces is pruned": [
        {"at": "r4b_core.parallel.manifest:publish", "match": r"pretrain'\), 4"},
        {"at": "r4b_core.parallel.manifest:prune"},
    ],
    "an annealing update": [{"at": UPDATE, "nth": 5}],
    "after a step's metrics, before its checkpoint": [{"at": "r4b_core.stages.job:Stage.save", "nth": 2}],
    "before the first evaluation is recorded": [{"at": LOG, "match": "eval/easy"}],
    "after the first evaluation is recorded": [{"at": LOG, "match": "eval/easy", "when": "after"}],
    "before the reference is published": [{"at": "os:rename", "match": "reference.*" + RENAMED}],
    "a BPO rollout": [{"at": "r4b_core.stages.bpo:rollouts"}, {"at": DECODE, "nth": 3}],
    "between rollout and update": [{"at": "r4b_core.stages.bpo:pack", "nth": 2}],
    "a BPO update": [{"at": "r4b_core.stages.bpo:pack", "nth": 4}, {"at": UPDATE}],
    "a file of rollouts": [{"at": "pathlib:Path.replace", "match": "parquet"}],
    "after a file of rollouts": [{"at": "pathlib:Path.replace", "match": "parquet", "when": "after"}],
    "a BPO checkpoint's files": [{"at": "r4b_core.parallel.manifest:write_json", "match": "bpo.*state.json"}],
    "the pruning of a BPO checkpoint": [
        {"at": "r4b_core.parallel.manifest:publish", "match": "bpo"},
        {"at": "r4b_core.parallel.manifest:remove_leftovers"},
    ],
    "the final evaluation": [{"at": "r4b_core.stages.run:evaluate"}, {"at": DECODE, "nth": 5}],
    "the summary": [{"at": "pathlib:Path.replace", "match": "summary.json"}],
    "the report": [{"at": "pathlib:Path.replace", "match": "report.html"}],
}


@pytest.fixture(scope="module")
def killed(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at every place, and then left to end."""
    run = tmp_path_factory.mktemp("killed") / "run"
    for name, events in PLACES.items():
        ended = server.run("train", *SMALL, "--run", run, events=events)
        assert ended.status == -9, f"{name}: {ended.status}\n{ended.output}"
        assert damage(run) == [], name
    ended = server.run("train", *SMALL, "--run", run)
    assert ended.status == 0, ended.output
    return run


@pytest.mark.parametrize("what", ["metrics", "rollouts", "figures", "weights", "files"])
def test_a_run_killed_everywhere_equals_the_undisturbed_one(straight: Path, killed: Path, what: str) -> None:
    assert outcome(killed)[what] == outcome(straight)[what]


def test_the_undisturbed_run_has_something_to_repeat(straight: Path) -> None:
    drawn = [row for rows in rollouts(straight).values() for row in rows]
    assert len(drawn) == 4 * 4 * 8
    assert sum(row["advantage"] != 0 for row in drawn) >= 8
    steps = [line for line in lines(straight) if "loss" in line]
    assert len(steps) == 4 + 15 + 4
    assert len({line["loss"] for line in steps}) == len(steps)


def test_a_finished_run_started_again_stays_as_it_is(server: ForkServer, straight: Path, killed: Path) -> None:
    before = outcome(killed)
    ended = server.run("train", *SMALL, "--run", killed)
    assert ended.status == 0, ended.output
    assert outcome(killed) == before

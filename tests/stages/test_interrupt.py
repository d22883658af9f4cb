"""Ctrl-C and SIGTERM: the step ends, the state is saved, and the command that is printed goes on from there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.stages.fork_server import ForkServer
from tests.stages.runs import SMALL, damage, lines, outcome

STEP = "r4b_core.parallel.learner:Learner.step"

# One run, stopped in each place in turn; after each stop it goes on with the command that the stop printed.
STOPS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "pre-training": ([{"at": STEP, "do": "INT"}], "pretrain step 1 of 4"),
    "a stage's last step": ([{"at": STEP, "nth": 3, "do": "TERM"}], "pretrain step 4 of 4"),
    "annealing": ([{"at": STEP, "nth": 2, "do": "INT", "when": "after"}], "anneal step 2 of 15"),
    "the first evaluation": ([{"at": "r4b_core.stages.run:evaluate", "do": "TERM"}], "the evaluation before BPO"),
    "a rollout": ([{"at": "r4b_core.stages.bpo:rollouts", "do": "INT"}], "bpo step 1 of 4"),
    "between two steps": ([{"at": "r4b_core.stages.job:Stage.log", "do": "TERM"}], "bpo step 2 of 4"),
    "the last step": ([{"at": STEP, "nth": 2, "do": "INT"}], "bpo step 4 of 4"),
}


def test_every_stop_saves_and_says_how_to_go_on(server: ForkServer, straight: Path, tmp_path: Path) -> None:
    command: list[Any] = ["train", *SMALL, "--run", "a run"]
    for place, (events, where) in STOPS.items():
        ended = server.run(*command, events=events, cwd=tmp_path)
        assert ended.status == 130, f"{place}: {ended.status}\n{ended.output}"
        said = [line for line in ended.output.splitlines() if "Go on with" in line]
        assert len(said) == 1 and ended.output.splitlines()[-1] == said[0], place
        match = re.fullmatch(rf"stopped after {where}; the state is saved\. Go on with: r4b (.*)", said[0])
        assert match, f"{place}: {said[0]}"
        assert "Traceback" not in ended.output
        command = shlex.split(match[1])
    ended = server.run(*command, cwd=tmp_path)
    assert ended.status == 0, ended.output
    stopped, undisturbed = outcome(tmp_path / "a run"), outcome(straight)
    for what in undisturbed:
        assert stopped[what] == undisturbed[what], what


def test_the_first_ctrl_c_is_answered_before_the_step_ends(server: ForkServer, tmp_path: Path) -> None:
    events = [{"at": STEP, "do": "INT"}]
    ended = server.run("train", *SMALL, "--run", tmp_path / "run", events=events)
    assert ended.output.count("Ctrl-C again stops at once") == 1


def test_a_second_ctrl_c_stops_at_once(server: ForkServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = [{"at": STEP, "nth": 2, "do": "tests.stages.accidents:ctrl_c_twice"}]
    ended = server.run("train", *SMALL, "--run", run, events=events)
    assert ended.status == 130, ended.output
    assert "Traceback" not in ended.output and "Go on with" not in ended.output
    assert [line["step"] for line in lines(run)] == [1]
    assert not any((run / "checkpoints").glob("*/*"))


@pytest.mark.parametrize("signals", ["INT", "TERM"])
def test_a_stop_whose_state_cannot_be_saved_says_so(server: ForkServer, tmp_path: Path, signals: str) -> None:
    run = tmp_path / "run"
    events = [
        {"at": STEP, "nth": 4, "do": signals},
        {"at": "r4b_core.parallel.manifest:publish", "do": "tests.stages.accidents:full_disk"},
    ]
    ended = server.run("train", *SMALL, "--run", run, events=events)
    assert ended.status == 130, ended.output
    assert "the state could not be saved, the checkpoint before it stands" in ended.output.splitlines()[-1]
    assert damage(run) == []

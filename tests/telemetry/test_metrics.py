"""metrics.jsonl: line by line, cut back on resume, and the time of a step."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r4b_core.telemetry.alarms import Alarms
from r4b_core.telemetry.metrics import Metrics, read_metrics, without_times
from r4b_core.telemetry.timeline import Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def open_metrics(path: Path, *, timeline: Timeline | None = None, active: bool = True) -> Metrics:
    return Metrics(path, timeline=timeline or Timeline(), alarms=Alarms(), active=active)


def test_a_line_is_on_file_when_log_returns(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "metrics.jsonl")
    metrics.log("bpo", 3, {"loss": torch.tensor(0.5), "note": "warm", "live": True})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["stage"], record["step"], record["loss"], record["note"], record["live"]) == (
        "bpo",
        3,
        0.5,
        "warm",
        1,
    )


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    open_metrics(path).log("bpo", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    record = read_metrics(path)[0]
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


@pytest.mark.parametrize("values", [{"step": 1}, {"loss": [1, 2]}, {"loss": None}])
def test_what_cannot_be_a_metric_is_refused_by_name(tmp_path: Path, values: dict) -> None:
    metrics = open_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=next(iter(values))):
        metrics.log("bpo", 1, values)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "metrics.jsonl", active=False)
    metrics.log("bpo", 1, {"loss": 1.0})
    metrics.truncate_after("bpo", 0)
    metrics.clear()
    assert list(tmp_path.iterdir()) == []


def test_tokens_become_tokens_per_second(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(clock)
    metrics = open_metrics(tmp_path / "metrics.jsonl", timeline=timeline)
    with timeline("update"):
        clock.now += 2.0
    metrics.log("anneal", 1, {"tokens": 500})
    assert read_metrics(metrics.path)[0]["perf/tokens_per_s"] == 250.0


def write(path: Path, start: tuple[int, int] = (0, 0)) -> Metrics:
    """Lines of anneal 1..6 and bpo 0..6, from a given (anneal, bpo) step on."""
    metrics = open_metrics(path)
    for step in range(start[0] + 1, 7):
        metrics.log("anneal", step, {"loss": 1 / step})
    for step in range(start[1], 7):
        if step % 2 == 0:
            metrics.log("bpo", step, {"thinking_rate/free": 0.0})
        if step:
            metrics.log("bpo", step, {"loss": step / 10})
    metrics.close()
    return metrics


@pytest.mark.parametrize(("stage", "step", "go_on"), [("anneal", 3, (3, 0)), ("anneal", 6, (6, 0)), ("bpo", 4, (6, 5))])
@pytest.mark.parametrize("tail", [b"", b'{"stage": "bpo", "st', b"\0\0\0\0\n\0\0"])
def test_a_resumed_file_equals_the_undisturbed_one(
    tmp_path: Path, stage: str, step: int, go_on: tuple[int, int], tail: bytes
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    write(whole)
    write(broken)
    with broken.open("ab") as file:
        file.write(tail)
    metrics = open_metrics(broken)
    metrics.truncate_after(stage, step)
    metrics.loggers.clear()
    for anneal in range(go_on[0] + 1, 7):
        metrics.log("anneal", anneal, {"loss": 1 / anneal})
    for bpo in range(go_on[1], 7):
        if bpo % 2 == 0:
            metrics.log("bpo", bpo, {"thinking_rate/free": 0.0})
        if bpo:
            metrics.log("bpo", bpo, {"loss": bpo / 10})
    assert without_times(read_metrics(broken)) == without_times(read_metrics(whole))
    assert any("alarm/thinking_collapse" in record for record in read_metrics(whole)), "the alarm's memory is replayed"


def test_truncation_says_what_it_cut(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.log("bpo", step, {"loss": 1.0})
    assert metrics.truncate_after("bpo", 1) == [("bpo", 2), ("bpo", 3)]
    assert [record["step"] for record in read_metrics(metrics.path)] == [1]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "bpo", "step": 1, "time": 0}\n{"stage": oops}\n{"stage": "bpo", "step": 2, "time": 0}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_every_line_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from r4b_core.telemetry.alarms import Alarms; from r4b_core.telemetry.metrics import Metrics\n"
        "from r4b_core.telemetry.timeline import Timeline\n"
        "metrics = Metrics(Path(sys.argv[1]), timeline=Timeline(), alarms=Alarms())\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1; metrics.log('bpo', step, {'loss': 1.0}); print(step, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        seen = 0
        while seen < 200:
            seen = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= seen


def test_phases_add_up_to_the_wall_time_and_nest() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    clock.now += 1.0
    with timeline("rollout"):
        clock.now += 2.0
        with timeline("reward"):
            clock.now += 4.0
        clock.now += 8.0
    assert timeline.drain() == {"timing_s/rollout": 10.0, "timing_s/reward": 4.0, "timing_s/other": 1.0}
    assert timeline.drain() == {}


def test_a_phase_ends_when_its_block_fails() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    with pytest.raises(RuntimeError), timeline("update"):
        clock.now += 1.0
        raise RuntimeError
    clock.now += 5.0
    assert timeline.drain() == {"timing_s/update": 1.0, "timing_s/other": 5.0}


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="rolout"), Timeline()("rolout"):
        pass

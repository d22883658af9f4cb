"""The run folder: what it holds, how it resumes, what it refuses; console and dashboards."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

from r4b_core.config.recipe import Recipe
from r4b_core.rollout.types import Group
from r4b_core.telemetry.console import ConsoleLogger
from r4b_core.telemetry.environment import describe_environment
from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.loggers import check_loggers, open_loggers
from r4b_core.telemetry.metrics import read_metrics
from r4b_core.telemetry.run import RunFolder


def quiet(path: Path, **options: Any) -> RunFolder:
    return RunFolder(path, console=False, **options)


def test_a_started_run_holds_its_recipe_and_environment(tmp_path: Path) -> None:
    recipe = Recipe(name="a", seed=5)
    with quiet(tmp_path / "run") as run:
        run.start(recipe)
    assert Recipe(**yaml.safe_load((tmp_path / "run" / "recipe.resolved.yaml").read_text())) == recipe
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"python", "torch", "megatron-core", "r4b"} <= environment["versions"].keys()
    assert environment["versions"]["torch"] and environment["hardware"]["cores"] >= 1
    assert environment.keys() == describe_environment().keys()


def test_other_ranks_leave_no_trace(tmp_path: Path, group: Callable[..., Group]) -> None:
    with quiet(tmp_path / "run", active=False) as run:
        run.start(Recipe(name="a"))
        with run.timeline("rollout"):
            pass
        run.metrics.log("bpo", 1, {"loss": 1.0})
        assert run.write_rollouts("bpo", 1, [group(1, "hard", 0.5)]) is None
        run.write_summary({})
    assert not (tmp_path / "run").exists()


def train(path: Path, group: Callable[..., Group], first: int, last: int, resumed_at: tuple[str, int] | None) -> None:
    with quiet(path) as run:
        run.start(Recipe(name="a"), resumed_at=resumed_at)
        for step in range(first, last + 1):
            with run.timeline("update"):
                run.metrics.log("bpo", step, {"loss": 1.0 / step, "thinking_rate/free": 0.0})
            run.write_rollouts("bpo", step, [group(step, "hard", 0.5)])


def test_resume_equals_the_undisturbed_run(tmp_path: Path, group: Callable[..., Group]) -> None:
    train(tmp_path / "whole", group, 1, 8, None)
    train(tmp_path / "broken", group, 1, 6, None)
    train(tmp_path / "broken", group, 5, 8, ("bpo", 4))
    for part in ("metrics.jsonl", "rollouts"):
        assert (tmp_path / "broken" / part).exists()
    strip = [
        [
            {k: v for k, v in r.items() if k != "time" and not k.startswith("timing_s/")}
            for r in read_metrics(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("whole", "broken")
    ]
    assert strip[0] == strip[1]
    names = [sorted(p.name for p in (tmp_path / n / "rollouts").iterdir()) for n in ("whole", "broken")]
    assert names[0] == names[1]
    (resume,) = json.loads((tmp_path / "broken" / "environment.json").read_text())["resumes"]
    assert (resume["stage"], resume["step"], resume["changed_settings"]) == ("bpo", 4, [])


def test_resume_removes_the_rollouts_of_steps_that_will_be_run_again(
    tmp_path: Path, group: Callable[..., Group]
) -> None:
    train(tmp_path / "run", group, 1, 6, None)
    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a"), resumed_at=("bpo", 4))
    assert sorted(p.name for p in (tmp_path / "run" / "rollouts").iterdir()) == [
        f"bpo-step_{i:06d}.parquet" for i in range(1, 5)
    ]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path, group: Callable[..., Group]) -> None:
    train(tmp_path / "run", group, 1, 3, None)
    train(tmp_path / "run", group, 1, 1, None)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == 1


def test_another_recipe_does_not_overwrite_a_run(tmp_path: Path, group: Callable[..., Group]) -> None:
    train(tmp_path / "run", group, 1, 3, None)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="seed"):
        quiet(tmp_path / "run").start(Recipe(name="a", seed=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a", seed=1), resumed_at=("bpo", 3))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["resumes"][0]["changed_settings"] == ["seed"]


def test_the_thinking_band_comes_from_the_recipe(tmp_path: Path) -> None:
    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a", bpo={"thinking_band": (0.0, 0.6)}))
        for step in range(5):
            run.metrics.log("bpo", step, {"thinking_rate/free": 0.7})
    (alarm,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "alarm/thinking_collapse" in r]
    assert alarm["step"] == 3


def test_alarms_reach_every_logger(tmp_path: Path) -> None:
    class Ear:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def log(self, stage: str, step: int, values: object) -> None:
            pass

        def alarm(self, stage: str, step: int, message: str) -> None:
            self.heard.append(f"{stage} {step} {message[:9]}")

        def close(self) -> None:
            pass

    ear = Ear()
    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a"))
        run.metrics.loggers.append(ear)
        run.metrics.log("bpo", 1, {"alarm/checkpoint": "disk full"})
        run.metrics.log("bpo", 2, {"loss": float("nan")})
    assert ear.heard == ["bpo 1 disk full", "bpo 2 loss is n"]


def test_write_atomic_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def lines(interactive: bool, steps: int = 25) -> str:
    stream = io.StringIO()
    logger = ConsoleLogger(
        {"bpo": steps}, console=Console(file=stream, force_terminal=interactive, width=160, color_system=None)
    )
    for step in range(1, steps + 1):
        if step % 5 == 0:
            logger.log("bpo", step, {"thinking_rate/free": 0.43})
        values = {"loss": 0.5, "reward/mean": 0.71, "perf/tokens_per_s": 12345.0, "timing_s/update": 2.0}
        logger.log("bpo", step, values)
    logger.alarm("bpo", steps, "look at [this]")
    logger.close()
    return stream.getvalue()


def test_plain_console_lines() -> None:
    *shown, alarm = lines(interactive=False).splitlines()
    assert [line.split()[1] for line in shown] == ["1/25", "10/25", "20/25", "25/25"]
    for part in ("loss 0.5", "reward 0.71", "thinking 43%", "12.3k tok/s", "2.00 s/step", "GB", "ETA 0:00:30"):
        assert part in shown[1]
    assert "thinking" not in shown[0] and alarm == "ALARM bpo step 25: look at [this]"


def test_interactive_console_draws_a_bar() -> None:
    text = lines(interactive=True)
    assert "25/25" in text and "━" in text and "thinking 43%" in text and "look at [this]" in text


def test_a_missing_dashboard_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ValueError, match="telemetry.loggers.*wandb.*pip install"):
        quiet(tmp_path / "run").start(Recipe(name="a", telemetry={"loggers": ["wandb"]}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="mlflow"):
        check_loggers(["mlflow"])


def test_dashboards_are_not_imported_unasked() -> None:
    names = ["wandb", "trackio", "tensorboard", "plotly"]
    code = f"import sys, r4b_core.telemetry.run; print([m for m in {names} if m in sys.modules])"
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


class Recorder(ModuleType):
    """Stands in for wandb and trackio, and keeps what it was called with."""

    class AlertLevel:
        WARN = "WARN"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Recorder:
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_dashboards_get_numbers_under_their_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    (logger,) = open_loggers([name], folder=tmp_path / "run-7", recipe={"seed": 3}, resumed_at=("bpo", 4))
    logger.log("bpo", 5, {"loss": 0.5, "note": "text"})
    logger.alarm("bpo", 5, "message")
    logger.close()
    calls = {call[0]: call for call in reversed(recorder.calls)}
    assert (
        calls["init"][2]["name"] == "run-7"
        and calls["init"][2]["config"] == {"seed": 3}
        and calls["init"][2]["resume"] == "allow"
    )
    assert calls["log"][1][0] == {"bpo/loss": 0.5, "bpo/step": 5}
    assert "finish" in calls and "message" in str(recorder.calls)


def test_tensorboard_has_a_folder_per_stage(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a", telemetry={"loggers": ["tensorboard"]}))
        for step in (1, 2, 3):
            run.metrics.log("anneal", step, {"loss": 1.0 / step})
    with quiet(tmp_path / "run") as run:
        run.start(Recipe(name="a", telemetry={"loggers": ["tensorboard"]}), resumed_at=("anneal", 2))
        run.metrics.log("anneal", 3, {"loss": 0.3})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "anneal"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.3)]

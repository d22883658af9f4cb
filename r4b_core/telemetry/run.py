"""The run folder: recipe.resolved.yaml, environment.json, metrics.jsonl, rollouts/, summary.json, report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from r4b_core.config.recipe import Recipe
from r4b_core.rollout.types import Group
from r4b_core.telemetry.alarms import Alarms
from r4b_core.telemetry.console import ConsoleLogger
from r4b_core.telemetry.environment import describe_environment, now
from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.loggers import open_loggers
from r4b_core.telemetry.metrics import Metrics
from r4b_core.telemetry.rollouts import rollouts_path, write_rollouts
from r4b_core.telemetry.timeline import Timeline

RECIPE = "recipe.resolved.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
_ROLLOUTS_NAME = re.compile(r"(?P<stage>.+)-step_(?P<step>\d+)\.parquet")


class RunFolder:
    """Everything a run leaves behind. Also a context manager that closes itself.

        run = RunFolder(path, active=rank == 0)
        run.start(recipe, resumed_at=("bpo", 50))
        with run.timeline("rollout"):
            ...
        run.metrics.log("bpo", step, {"loss": loss})

    Args:
        path: the folder; made when the run starts.
        active: False on every rank but the main one. Such a run folder takes the same calls and writes nothing.
        console: False keeps the terminal quiet.
        console_every: steps between plain console lines where there is no terminal.
    """

    def __init__(self, path: str | Path, *, active: bool = True, console: bool = True, console_every: int = 10) -> None:
        self.path = Path(path)
        self.active = active
        self.timeline = Timeline()
        self._alarms = Alarms()
        self.metrics = Metrics(self.path / METRICS, timeline=self.timeline, alarms=self._alarms, active=active)
        self._console = console
        self._console_every = console_every

    def start(self, recipe: Recipe, resumed_at: tuple[str, int] | None = None) -> None:
        """Write the recipe and the environment, and cut metrics and rollouts back to where the run goes on.

        Args:
            resumed_at: (stage, step) of the checkpoint that was loaded, or None for a run from its beginning. A run
                that was killed before its first checkpoint begins anew in its folder.

        Raises:
            ValueError: a new run in the folder of another recipe, a ``telemetry.loggers`` entry whose package is
                missing, or a damaged metrics file.
        """
        self._alarms.thinking_band = recipe.bpo.thinking_band
        if not self.active:
            return
        resolved = recipe.model_dump(mode="json")
        changes = self._changes(resolved)
        if changes and resumed_at is None:
            raise ValueError(
                f"{self.path} holds a run of another recipe (different: {', '.join(changes)}): give this run a folder "
                "of its own, or delete that one"
            )
        loggers = open_loggers(recipe.telemetry.loggers, folder=self.path, recipe=resolved, resumed_at=resumed_at)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_environment(resumed_at, changes)
        write_atomic(self.path / RECIPE, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        self._cut(resumed_at)
        if self._console:
            self.metrics.loggers.append(ConsoleLogger(stage_steps(recipe), every=self._console_every))
        self.metrics.loggers += loggers
        self.timeline.drain()

    def write_rollouts(self, stage: str, step: int, groups: Sequence[Group]) -> Path | None:
        """Write ``rollouts/<stage>-step_<step>.parquet``; None on a rank that writes nothing."""
        if not self.active:
            return None
        path = rollouts_path(self.path, stage, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(path, groups)
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: before_bpo and after_bpo by family and mode, seconds, peak_rss_gb."""
        if self.active:
            write_atomic(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the metrics file and every dashboard."""
        for logger in self.metrics.loggers:
            logger.close()
        self.metrics.loggers.clear()
        self.metrics.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _changes(self, resolved: Mapping[str, Any]) -> list[str]:
        path = self.path / RECIPE
        if not path.exists():
            return []
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        return sorted(name for name in before.keys() | resolved.keys() if before.get(name) != resolved.get(name))

    def _write_environment(self, resumed_at: tuple[str, int] | None, changes: list[str]) -> None:
        path = self.path / ENVIRONMENT
        environment = describe_environment()
        if resumed_at is not None and path.exists():
            first = json.loads(path.read_text(encoding="utf-8"))
            resume = {"date": now(), "stage": resumed_at[0], "step": resumed_at[1], "changed_settings": changes}
            if environment["versions"] != first["versions"]:
                resume["versions"] = environment["versions"]
            environment = first | {"resumes": [*first.get("resumes", []), resume]}
        write_atomic(path, json.dumps(environment, indent=2) + "\n")

    def _cut(self, resumed_at: tuple[str, int] | None) -> None:
        if resumed_at is None:
            self.metrics.clear()
            cut = None
        else:
            cut = set(self.metrics.truncate_after(*resumed_at))
        for path in (self.path / "rollouts").glob("*.parquet"):
            match = _ROLLOUTS_NAME.fullmatch(path.name)
            if match is None:
                continue
            at = (match["stage"], int(match["step"]))
            if cut is None or at in cut or (resumed_at and at[0] == resumed_at[0] and at[1] > resumed_at[1]):
                path.unlink()


def stage_steps(recipe: Recipe) -> dict[str, int]:
    """Steps of each stage, as the console counts them."""
    tail = recipe.anneal.tail_steps if recipe.anneal.tail != "none" else 0
    return {
        "pretrain": recipe.pretrain.steps,
        "anneal": recipe.anneal.steps + tail,
        "distill": recipe.distill.steps,
        "bpo": recipe.bpo.steps,
    }

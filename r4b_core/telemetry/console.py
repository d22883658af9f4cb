"""What a run shows while it goes: one line per step, as a progress bar on a terminal and as plain lines in a log."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

WINDOW = 20


class ConsoleLogger:
    """Follows metrics lines; a line that has a ``loss`` or ``reward/mean`` ends a step and is shown.

    Args:
        totals: steps per stage, for the progress and the time left; a stage that is missing shows its step alone.
        every: plain lines are shown at the first, every ``every``-th and the last step of a stage.
        console: where to; a terminal gets a progress bar, anything else plain lines.
    """

    def __init__(self, totals: Mapping[str, int], *, every: int = 10, console: RichConsole | None = None) -> None:
        self._totals = dict(totals)
        self._every = every
        self._console = console or RichConsole(file=sys.stderr, highlight=False)
        self._stage = ""
        self._seconds = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._latest: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        first = stage != self._stage
        if first:
            self._stage, self._seconds, self._latest = stage, 0.0, {}
            self._window.clear()
        self._latest.update(values)
        self._seconds += sum(v for k, v in values.items() if k.startswith("timing_s/"))
        if "loss" not in values and "reward/mean" not in values:
            return
        self._window.append(self._seconds)
        total = self._totals.get(stage, 0)
        text = step_line(self._latest, self._seconds, self._left(step, total))
        self._seconds = 0.0
        if self._console.is_terminal:
            self._show_bar(stage, step, max(total, step), text)
        elif first or step % self._every == 0 or step == total:
            count = f"{step}/{total}" if total >= step else str(step)
            self._console.print(f"{stage:<9} {count:>9}  {text}", markup=False, soft_wrap=True)

    def alarm(self, stage: str, step: int, message: str) -> None:
        self._console.print(f"[bold yellow]ALARM[/] {stage} step {step}: {escape(message)}", soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _left(self, step: int, total: int) -> float | None:
        return (total - step) * sum(self._window) / len(self._window) if total >= step else None

    def _show_bar(self, stage: str, step: int, total: int, text: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
            )
            self._progress.start()
            self._task = None
        if self._task is None or self._progress.tasks[-1].description != stage:
            self._task = self._progress.add_task(stage, total=total, text=text)
        self._progress.update(self._task, completed=step, total=total, text=text)


def step_line(values: Mapping[str, Any], seconds: float, left: float | None) -> str:
    """Loss, reward, thinking rate, speed, memory and time left, each where it is known."""
    parts: list[str] = []
    for name, label in (("loss", "loss"), ("reward/mean", "reward")):
        if name in values:
            parts.append(f"{label} {values[name]:.4g}")
    if "thinking_rate/free" in values and not math.isnan(values["thinking_rate/free"]):
        parts.append(f"thinking {values['thinking_rate/free']:.0%}")
    if "perf/tokens_per_s" in values:
        parts.append(f"{_short(values['perf/tokens_per_s'])} tok/s")
    parts.append(f"{seconds:.2f} s/step")
    parts.append(f"{memory_gb():.2f} GB")
    if left is not None:
        parts.append(f"ETA {timedelta(seconds=round(left))}")
    return "  ".join(parts)


def memory_gb() -> float:
    """Gigabytes (1e9 bytes): the GPU's peak allocation where CUDA is in use, else this process' resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"

"""Times taken in turns: one call of each way, again and again, so that a busy machine slows all of them alike.

With one thread and no GPU the time is the process's own processor time, which other jobs do not lengthen; else it is
the time on the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from r4b_core.parallel.device import synchronize


@dataclass(frozen=True)
class Times:
    """Medians over the turns, in seconds: on the wall, and of this process's processor time."""

    wall: dict[str, float]
    cpu: dict[str, float]

    @property
    def clock(self) -> str:
        alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
        return "processor time" if alone else "wall time"

    @property
    def seconds(self) -> dict[str, float]:
        """By the clock that says most on this machine."""
        return self.cpu if self.clock == "processor time" else self.wall


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> Times:
    """Median seconds of each way after one call to warm up."""
    for call in ways.values():
        call()
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, call in ways.items():
            synchronize()
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return Times(*({name: statistics.median(seconds) for name, seconds in clock.items()} for clock in (wall, cpu)))

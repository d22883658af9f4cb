"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("rollout", "reward", "reference", "update", "checkpoint", "evaluate", "other")


class Timeline:
    """Seconds per phase since the last ``drain``.

    ``with timeline("rollout"):`` adds the block's seconds to that phase. A nested block's seconds count for the inner
    phase only, so the phases of a step add up to its wall time; what no phase claims is ``other``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's seconds as ``phase``.

        Raises:
            ValueError: a phase that is not one of PHASES; reports and dashboards know no other.
        """
        if phase not in PHASES:
            raise ValueError(f"timeline phase {phase!r} is unknown: use one of {', '.join(PHASES)}")
        self._settle()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def drain(self) -> dict[str, float]:
        """``{"timing_s/<phase>": seconds}`` since the last drain (phases that took time only), and start anew."""
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{phase}": round(seconds[phase], 6) for phase in PHASES if seconds.get(phase, 0.0) > 0.0}

    def _settle(self) -> None:
        now = self._clock()
        phase = self._stack[-1] if self._stack else "other"
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

"""Alarms: four ways in which a run goes wrong long before its loss shows it.

An alarm is raised once when its condition begins and again only after the condition had ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRUNCATION_LIMIT = 0.5
ZERO_VARIANCE_LIMIT = 0.9
LOSS_NAMES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Alarm:
    """``name`` becomes the metric ``alarm/<name>``; ``message`` says what was seen and what to try."""

    name: str
    message: str


@dataclass
class Alarms:
    """The rules, with what they remember between lines.

    Attributes:
        thinking_band: (low, high); the free thinking rate is to stay within it (``bpo.thinking_band``).
        patience: probes in a row outside the band before the alarm (one noisy probe is none).
    """

    thinking_band: tuple[float, float] = (0.02, 0.98)
    patience: int = 4
    _outside: int = field(default=0, init=False)
    _raised: set[str] = field(default_factory=set, init=False)

    def update(self, stage: str, step: int, values: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin with this line."""
        found: list[Alarm] = []
        for name, value in values.items():
            if not isinstance(value, (int, float)):
                continue
            found += self._non_finite(stage, name, value)
            found += self._collapse(name, value)
            found += self._truncation(name, value)
            found += self._zero_variance(name, value)
        return found

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Set the memory to what it was after these lines of metrics.jsonl."""
        self._outside = 0
        self._raised.clear()
        for record in records:
            values = {k: v for k, v in record.items() if k not in ("stage", "step", "time")}
            self.update(record["stage"], record["step"], values)

    def _edge(self, key: str, active: bool, alarm: Alarm) -> list[Alarm]:
        if not active:
            self._raised.discard(key)
            return []
        if key in self._raised:
            return []
        self._raised.add(key)
        return [alarm]

    def _non_finite(self, stage: str, name: str, value: float) -> list[Alarm]:
        if name.split("/")[0] not in LOSS_NAMES:
            return []
        message = (
            f"{name} is {value}: the update of this step is not to be trusted; lower {stage}.optim.lr or "
            f"{stage}.optim.clip_grad, and look at the samples of this step"
        )
        return self._edge(f"non_finite {name}", not math.isfinite(value), Alarm("non_finite", message))

    def _collapse(self, name: str, value: float) -> list[Alarm]:
        if name != "thinking_rate/free":
            return []
        low, high = self.thinking_band
        self._outside = 0 if low <= value <= high else self._outside + 1
        seen, lost = ("hardly ever thinks", "thinking") if value < low else ("nearly always thinks", "a direct answer")
        message = (
            f"the free thinking rate is {value:.3f}, for {self._outside} probes outside [{low:g}, {high:g}]: the model "
            f"{seen}, so it cannot learn where {lost} is better; use bpo.rollouts: both, another bpo.mix "
            "(of records: bpo.bands), a larger bpo.kl_coef, or widen bpo.thinking_band if this is wanted"
        )
        return self._edge("collapse", self._outside >= self.patience, Alarm("thinking_collapse", message))

    def _truncation(self, name: str, value: float) -> list[Alarm]:
        if name.split("/")[0] != "truncation":
            return []
        message = (
            f"{name} is {value:.2f}: more than half of these responses hit the budget, so their rewards judge the "
            "budget and not the answer; raise bpo.max_new_tokens"
        )
        return self._edge(name, value > TRUNCATION_LIMIT, Alarm(name, message))

    def _zero_variance(self, name: str, value: float) -> list[Alarm]:
        if name != "group/zero_variance/union":
            return []
        message = (
            f"{value:.0%} of the groups have equal rewards throughout and teach nothing; use harder or easier prompts "
            "(bpo.mix; of records bpo.bands), a larger bpo.group_size, or bpo.drop_zero_variance: true"
        )
        return self._edge(name, value > ZERO_VARIANCE_LIMIT, Alarm("zero_variance", message))

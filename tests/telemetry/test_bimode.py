"""Bi-mode metrics and alarms, on groups small enough to count by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.types import FinishReason, Group, Rollout
from r4b_core.telemetry.alarms import Alarms
from r4b_core.telemetry.bimode import bimode_metrics, covert_length, is_covert, is_malformed, probe_metrics

Make = Callable[..., Rollout]
T, D, A = Mode.THINKING, Mode.DIRECT, Mode.AUTO


def test_every_number_of_a_step(rollout: Make, sample: Callable[..., object], tokens: ModeTokens) -> None:
    first = Group(sample(0), [], [])
    first.rollouts = [
        rollout(T, length=10, reward=1.0, advantage=1.0, thinking_probability=0.2),
        rollout(T, length=20, reward=0.0, advantage=-0.5, thinking_probability=0.2, finish=FinishReason.LENGTH),
        rollout(D, reward=0.0, advantage=-1.0, thinking_probability=0.2),
        rollout(D, reward=0.0, advantage=-1.0, thinking_probability=0.2),
    ]
    second = Group(
        sample(1), [], [rollout(m, reward=1.0, advantage=0.0, thinking_probability=0.6) for m in (T, T, D, D)]
    )
    found = bimode_metrics([first, second], tokens)
    expected = {
        "reward/mean": 5 / 8,
        "reward/thinking": 3 / 4,
        "reward/direct": 2 / 4,
        "response_length/thinking/mean": (14 + 24 + 16 + 16) / 4,
        "response_length/thinking/max": 24.0,
        "response_length/thinking/clip_ratio": 0.25,
        "response_length/direct/mean": 4.0,
        "truncation/thinking": 0.25,
        "truncation/direct": 0.0,
        "advantage/gap": 0.5 / 4 - (-2.0 / 4),
        "group/zero_variance/union": 0.5,
        "group/zero_variance/thinking": 0.5,
        "group/zero_variance/direct": 1.0,
        "decision/probability": 0.4,
        "decision/entropy": 0.5,
        "covert_thinking/rate": 0.0,
        "malformed/rate": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert not [name for name, value in found.items() if not math.isfinite(value)]


def test_free_rollouts_count_for_the_mode_they_took(
    rollout: Make, sample: Callable[..., object], tokens: ModeTokens
) -> None:
    rollouts = [rollout(T, reward=1.0, mode=A, forced=0), rollout(D, reward=0.0, mode=A, forced=0)]
    found = bimode_metrics([Group(sample(0), [], rollouts)], tokens)
    assert (found["reward/thinking"], found["reward/direct"], found["thinking_rate/rollouts"]) == (1.0, 0.0, 0.5)


def test_what_cannot_be_computed_is_left_out(rollout: Make, sample: Callable[..., object], tokens: ModeTokens) -> None:
    found = bimode_metrics([Group(sample(0), [], [rollout(T, reward=math.nan, advantage=math.nan)])], tokens)
    assert "reward/thinking" not in found and "reward/direct" not in found and "advantage/gap" not in found
    assert "group/zero_variance/union" not in found
    assert bimode_metrics([], tokens) == {} and probe_metrics([], tokens) == {}


def test_probes_by_source_and_difficulty(rollout: Make, sample: Callable[..., object], tokens: ModeTokens) -> None:
    hard = Group(
        sample(0, "hard"),
        [],
        [rollout(T, mode=A, thinking_probability=0.9), rollout(D, mode=A, thinking_probability=0.9)],
    )
    easy = Group(
        sample(1, "easy"), [], [rollout(D, mode=A, thinking_probability=0.1), rollout(T, thinking_probability=1.0)]
    )
    found = probe_metrics([hard, easy], tokens)
    assert found["thinking_rate/free"] == pytest.approx(1 / 3)
    assert found["thinking_rate/free/difficulty/hard"] == 0.5 and found["thinking_rate/free/difficulty/easy"] == 0.0
    assert found["thinking_rate/free/value"] == 0.5 and found["thinking_rate/free/read"] == 0.0
    assert found["decision/probability/free/difficulty/easy"] == pytest.approx(0.1)


def test_covert_thinking(rollout: Make, sample: Callable[..., object], tokens: ModeTokens) -> None:
    t = tokens
    assert not is_covert(rollout(D), t, 8)
    assert is_covert(rollout(D, length=9), t, 8) and not is_covert(rollout(D, length=8), t, 8)
    before = [t.blank_line, 30, 31, t.think_close, 20, t.turn_end]
    reopened = [t.blank_line, t.think_close, t.think_open, 30, t.think_close, 20, t.turn_end]
    closed_again = [t.blank_line, t.think_close, 30, t.think_close, 20, t.turn_end]
    for sequence in (before, reopened, closed_again):
        assert is_covert(rollout(D, tokens=sequence), t, 8)
    never_closed = rollout(D, tokens=[t.blank_line] + [30] * 12, finish=FinishReason.LENGTH)
    assert is_covert(never_closed, t, 8) and not is_covert(never_closed, t, 12)
    assert covert_length([Group(sample(0), [], [rollout(T, length=36)])]) == 20
    assert covert_length([Group(sample(0), [], [rollout(T, length=2)])]) == 8 == covert_length([])


def test_malformed(rollout: Make, tokens: ModeTokens) -> None:
    assert not is_malformed(rollout(T), tokens) and not is_malformed(rollout(D), tokens)
    assert is_malformed(rollout(T, mode=A, taken=A, tokens=[30, 31]), tokens)
    endless = [tokens.newline, 30, 31]
    assert is_malformed(rollout(T, tokens=endless), tokens)
    assert not is_malformed(rollout(T, tokens=endless, finish=FinishReason.LENGTH), tokens)


def raised(alarms: Alarms, name: str, values: list[float]) -> list[int]:
    return [step for step, value in enumerate(values) if alarms.update("bpo", step, {name: value})]


def test_collapse_needs_probes_in_a_row() -> None:
    rate = "thinking_rate/free"
    assert raised(Alarms((0.1, 0.9), patience=3), rate, [0.0, 0.05, 0.5, 0.0, 0.0, 0.0, 0.0]) == [5]
    assert raised(Alarms((0.1, 0.9), patience=3), rate, [0.95, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]) == [2, 6]
    assert raised(Alarms((0.1, 0.9), patience=3), rate, [0.1, 0.9] * 5) == []
    collapse = Alarms((0.1, 0.9), patience=1)
    (alarm,) = collapse.update("bpo", 0, {rate: 0.0})
    assert alarm.name == "thinking_collapse" and "bpo.thinking_band" in alarm.message


@pytest.mark.parametrize(
    ("name", "values", "steps"),
    [
        ("loss", [1.0, math.nan, math.inf, 1.0, math.nan], [1, 4]),
        ("grad_norm", [math.inf], [0]),
        ("truncation/thinking", [0.5, 0.51, 0.6, 0.1, 0.7], [1, 4]),
        ("group/zero_variance/union", [0.9, 0.95, 0.2, 1.0], [1, 3]),
        ("group/zero_variance/direct", [1.0], []),
        ("reward/mean", [math.nan], []),
    ],
)
def test_an_alarm_is_raised_once_per_stretch(name: str, values: list[float], steps: list[int]) -> None:
    assert raised(Alarms(), name, values) == steps

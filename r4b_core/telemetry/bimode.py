"""What the two modes do: metrics of groups of rollouts, as pure functions.

A rollout counts for the mode that was forced; where none was, for the mode it took. Numbers that have nothing to be
computed from (no direct rollout, no graded reward) are left out, so no metric is ever a silent NaN.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.types import FinishReason, Group, Rollout

COVERT_SHARE = 0.5
COVERT_MINIMUM = 8
BOTH = (Mode.THINKING, Mode.DIRECT)


def bimode_metrics(
    groups: Sequence[Group], tokens: ModeTokens, *, covert_threshold: int | None = None
) -> dict[str, float]:
    """Metrics of one step's training groups, graded and with advantages.

    Args:
        tokens: the tokenizer's mode tags.
        covert_threshold: see ``is_covert``; None takes ``covert_length(groups)``.

    Returns:
        ``reward/{mean,thinking,direct}``, ``response_length/{mean,max,clip_ratio}`` and the same per mode in tokens,
        ``truncation/{mode}`` (share that hit the budget), ``advantage/gap`` (thinking minus direct),
        ``group/zero_variance/{union,thinking,direct}`` (share of groups whose rewards are all equal),
        ``decision/probability`` (mean p(think)), ``decision/entropy`` (nats, at the decision),
        ``covert_thinking/rate`` (share of direct responses), ``malformed/rate``, and ``thinking_rate/rollouts`` where
        the rollouts were free.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    threshold = covert_length(groups) if covert_threshold is None else covert_threshold
    metrics: dict[str, float] = {}
    _put(metrics, "reward/mean", (r.reward for r in rollouts))
    _lengths(metrics, "response_length", rollouts)
    for mode in BOTH:
        mine = [rollout for rollout in rollouts if effective_mode(rollout) is mode]
        _put(metrics, f"reward/{mode}", (r.reward for r in mine))
        _lengths(metrics, f"response_length/{mode}", mine)
        _put(metrics, f"truncation/{mode}", (r.finish is FinishReason.LENGTH for r in mine))
        _put(
            metrics,
            f"group/zero_variance/{mode}",
            _zero_variance(groups, lambda r, mode=mode: effective_mode(r) is mode),
        )
        if mode is Mode.DIRECT:
            _put(metrics, "covert_thinking/rate", (is_covert(r, tokens, threshold) for r in mine))
    _put(metrics, "group/zero_variance/union", _zero_variance(groups, lambda r: True))
    means = {mode: _mean(r.advantage for r in rollouts if effective_mode(r) is mode) for mode in BOTH}
    if means[Mode.THINKING] is not None and means[Mode.DIRECT] is not None:
        metrics["advantage/gap"] = means[Mode.THINKING] - means[Mode.DIRECT]
    _put(metrics, "decision/probability", (r.thinking_probability for r in rollouts))
    _put(metrics, "decision/entropy", (r.entropies[0] for r in rollouts if r.entropies))
    _put(metrics, "malformed/rate", (is_malformed(r, tokens) for r in rollouts))
    _put(metrics, "thinking_rate/rollouts", (r.taken is Mode.THINKING for r in rollouts if r.mode is Mode.AUTO))
    return metrics


def probe_metrics(groups: Sequence[Group], tokens: ModeTokens) -> dict[str, float]:
    """Metrics of free probes; rollouts whose mode was forced are not counted.

    Returns:
        ``thinking_rate/free``, ``thinking_rate/free/{source}``, ``thinking_rate/free/difficulty/{difficulty}`` and the
        same three under ``decision/probability/free`` (mean p(think): a greedy rate jumps when it crosses one half,
        the probability shows it coming); ``reward/free``, ``response_length/free``, ``malformed/free``.
    """
    free = [(group, r) for group in groups for r in group.rollouts if r.mode is Mode.AUTO]
    metrics: dict[str, float] = {}
    _put(metrics, "reward/free", (r.reward for _, r in free))
    _put(metrics, "response_length/free", (len(r.tokens) for _, r in free))
    _put(metrics, "malformed/free", (is_malformed(r, tokens) for _, r in free))
    cuts: dict[str, list[Rollout]] = defaultdict(list)
    for group, rollout in free:
        cuts[""].append(rollout)
        cuts[f"/{_name(group.sample.source)}"].append(rollout)
        if group.sample.difficulty:
            cuts[f"/difficulty/{_name(group.sample.difficulty)}"].append(rollout)
    for cut, mine in sorted(cuts.items()):
        _put(metrics, f"thinking_rate/free{cut}", (r.taken is Mode.THINKING for r in mine))
        _put(metrics, f"decision/probability/free{cut}", (r.thinking_probability for r in mine))
    return metrics


def effective_mode(rollout: Rollout) -> Mode:
    """The forced mode, else the one taken (AUTO where the decision was neither)."""
    return rollout.taken if rollout.mode is Mode.AUTO else rollout.mode


def is_malformed(rollout: Rollout, tokens: ModeTokens) -> bool:
    """A decision that is neither mode, or a response that ended by itself and has no answer after ``</think>``.

    A response cut by the budget is truncated, not malformed.
    """
    if rollout.taken is Mode.AUTO:
        return True
    return rollout.finish is FinishReason.STOP and not tokens.split(rollout.tokens)[1]


def is_covert(rollout: Rollout, tokens: ModeTokens, threshold: int) -> bool:
    """Does a direct response reason all the same (R-4B asks for an answer at once)?

    It does if anything stands between the decision and ``</think>``, if a tag opens or closes reasoning again after
    it, or if what follows ``</think>`` is longer than ``threshold`` tokens (turn end not counted).
    """
    reasoning, answer = tokens.split(rollout.tokens)
    if tokens.think_close not in rollout.tokens:
        return len(reasoning) > threshold
    return bool(reasoning) or tokens.think_open in answer or tokens.think_close in answer or len(answer) > threshold


def covert_length(groups: Sequence[Group]) -> int:
    """Tokens beyond which a direct answer counts as reasoning: half the median thinking response, at least 8."""
    lengths = [len(r.tokens) for group in groups for r in group.rollouts if effective_mode(r) is Mode.THINKING]
    return max(COVERT_MINIMUM, math.ceil(COVERT_SHARE * median(lengths))) if lengths else COVERT_MINIMUM


def _lengths(metrics: dict[str, float], name: str, rollouts: Sequence[Rollout]) -> None:
    if rollouts:
        lengths = [len(rollout.tokens) for rollout in rollouts]
        metrics[f"{name}/mean"] = fmean(lengths)
        metrics[f"{name}/max"] = float(max(lengths))
        metrics[f"{name}/clip_ratio"] = fmean(r.finish is FinishReason.LENGTH for r in rollouts)


def _zero_variance(groups: Sequence[Group], member: Callable[[Rollout], bool]) -> list[bool]:
    """For each group with two or more graded members: are their rewards all equal?"""
    rewards = [[r.reward for r in group.rollouts if member(r) and math.isfinite(r.reward)] for group in groups]
    return [min(values) == max(values) for values in rewards if len(values) > 1]


def _mean(values: Iterable[float]) -> float | None:
    finite = [float(value) for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def _put(metrics: dict[str, float], name: str, values: Iterable[float]) -> None:
    mean = _mean(values)
    if mean is not None:
        metrics[name] = mean


def _name(label: str) -> str:
    """A label as one component of a metric name."""
    return label.replace("/", "_") or "unknown"

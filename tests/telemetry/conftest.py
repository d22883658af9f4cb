"""A made-up run with numbers like those of a real one, so that reports can be tested without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r4b_core.config.recipe import Recipe
from r4b_core.data.schema import Sample
from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.types import FinishReason, Group, Rollout
from r4b_core.telemetry.run import RunFolder

TOKENS = ModeTokens(think_open=1, think_close=2, newline=3, blank_line=4, turn_end=5)
STAGES = (("pretrain", 40, 2.8), ("anneal", 60, 1.9))


def make_rollout(
    kind: Mode, *, length: int = 0, reward: float = 1.0, advantage: float = 0.0, **changes: object
) -> Rollout:
    """A well-formed rollout of ``length`` reasoning or answer tokens; ``changes`` override fields."""
    thinking = kind is Mode.THINKING
    reasoning = [10] * (length or 12) if thinking else []
    answer = [20] if thinking else [20] * (length or 1)
    tokens = [
        TOKENS.newline if thinking else TOKENS.blank_line,
        *reasoning,
        TOKENS.think_close,
        *answer,
        TOKENS.turn_end,
    ]
    text = "\nt1 start 7, value 7\nt2 add 5, value 2\nt3 mul 3, value 6\n</think>6" if thinking else "\n\n</think>6"
    fields: dict[str, object] = dict(
        tokens=tokens,
        logprobs=[-0.2] * len(tokens),
        entropies=[0.5] + [0.1] * (len(tokens) - 1),
        mode=kind,
        taken=kind,
        forced=1 if thinking else 2,
        finish=FinishReason.STOP,
        seed=7,
        thinking_probability=0.3,
        reward=reward,
        reward_reason="the extracted answer equals the reference" if reward else "extracted 4, expected 6",
        text=text,
        advantage=advantage,
    )
    return Rollout(**{**fields, **changes})  # type: ignore[arg-type]


def make_sample(index: int = 0, difficulty: str = "hard", question: str | None = None) -> Sample:
    rng = np.random.default_rng(index)
    board = np.repeat(np.repeat(rng.integers(40, 255, (3, 4, 3), dtype=np.uint8), 16, axis=0), 16, axis=1)
    text = (
        question
        or "Start at the grey tile and apply each tile in reading order, modulo 10. Which value stands at the end?"
    )
    source = "value" if difficulty == "hard" else "read"
    return Sample(f"{source}-{index:05d}", source, [board], text, "6", difficulty=difficulty)


def make_group(index: int, difficulty: str, progress: float, question: str | None = None) -> Group:
    rng = np.random.default_rng(1000 + index)
    hard = difficulty == "hard"
    rights = {Mode.THINKING: rng.random(4) < 0.95, Mode.DIRECT: rng.random(4) < (0.15 if hard else 0.98)}
    rewards = np.concatenate([rights[Mode.THINKING], rights[Mode.DIRECT]]).astype(float)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6) if rewards.std() > 0 else np.zeros(8)
    probability = 0.05 + 0.9 * progress if hard else 0.03
    group = Group(make_sample(index, difficulty, question), prompt_tokens=[9, 9, 1])
    for position, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
        mode = Mode.THINKING if position < 4 else Mode.DIRECT
        finish = FinishReason.LENGTH if position == 1 and not reward else FinishReason.STOP
        group.rollouts.append(
            make_rollout(
                mode, reward=float(reward), advantage=float(advantage), thinking_probability=probability, finish=finish
            )
        )
    return group


def fill_run(path: Path, *, question: str | None = None) -> Path:
    """Write a whole run: three stages, probes, rollouts, a summary, one alarm."""
    recipe = Recipe(name="laptop demo", seed=3)
    rng = np.random.default_rng(0)
    with RunFolder(path, console=False) as run:
        run.start(recipe)
        for stage, steps, start in STAGES:
            for step in range(1, steps + 1):
                loss = start * math.exp(-4 * step / steps) + 0.05 + 0.05 * rng.random()
                run.metrics.log(
                    stage,
                    step,
                    {"loss": loss, "grad_norm": 0.4 + rng.random(), "timing_s/update": 0.08 + 0.02 * rng.random()},
                )
        for step in range(0, 101):
            progress = 1 / (1 + math.exp(-(step - 45) / 8))
            if step % 5 == 0:
                run.metrics.log("bpo", step, probe_values(progress, rng))
            if step:
                run.metrics.log("bpo", step, step_values(progress, rng, truncation=0.62 if step == 31 else 0.02))
            if step and step % 10 == 0:
                difficulties = ["easy" if i % 3 == 0 else "hard" for i in range(16)]
                groups = [make_group(100 * step + i, d, progress, question) for i, d in enumerate(difficulties)]
                run.write_rollouts("bpo", step, groups)
        run.write_summary(SUMMARY)
    return path


def probe_values(progress: float, rng: np.random.Generator) -> dict[str, float]:
    p = {
        "easy": 0.02 + 0.03 * progress,
        "direct": 0.03 + 0.08 * progress,
        "mid": 0.04 + 0.8 * progress,
        "hard": 0.05 + 0.94 * progress,
    }
    values = {f"decision/probability/free/difficulty/{name}": value for name, value in p.items()}
    values |= {f"thinking_rate/free/difficulty/{n}": min(1.0, max(0.0, 3 * (v - 0.34))) for n, v in p.items()}
    values["thinking_rate/free"] = 0.1 + 0.5 * progress
    return values


def step_values(progress: float, rng: np.random.Generator, truncation: float) -> dict[str, float]:
    return {
        "loss": 0.02 * (1 - progress) + 0.01 * rng.normal(),
        "grad_norm": 0.3 + 0.2 * rng.random(),
        "kl": 0.02 + 0.1 * progress,
        "reward/mean": 0.6 + 0.1 * rng.random(),
        "reward/thinking": 0.93 + 0.05 * rng.random(),
        "reward/direct": 0.42 + 0.1 * rng.random(),
        "response_length/thinking/mean": 17 + rng.random(),
        "response_length/direct/mean": 4 + 0.1 * rng.random(),
        "truncation/thinking": truncation,
        "truncation/direct": 0.0,
        "advantage/gap": 0.9 + 0.2 * rng.random(),
        "decision/entropy": 0.6 - 0.4 * progress + 0.05 * rng.random(),
        "group/zero_variance/union": 0.3 + 0.1 * rng.random(),
        "group/zero_variance/thinking": 0.8 + 0.1 * rng.random(),
        "group/zero_variance/direct": 0.5 + 0.1 * rng.random(),
        "malformed/rate": 0.01,
        "covert_thinking/rate": 0.0,
        "timing_s/rollout": 0.12 + 0.02 * rng.random(),
        "timing_s/reward": 0.004,
        "timing_s/reference": 0.02,
        "timing_s/update": 0.07,
        "timing_s/other": 0.006,
    }


def cell(accuracy: float, tokens: float, thinking: float) -> dict[str, float]:
    return {"accuracy": accuracy, "mean_tokens": tokens, "thinking_rate": thinking}


SUMMARY = {
    "before_bpo": {
        "easy": {"direct": cell(0.996, 4.0, 0.0), "thinking": cell(0.93, 11.9, 1.0), "auto": cell(0.996, 4.0, 0.0)},
        "hard": {"direct": cell(0.121, 4.0, 0.0), "thinking": cell(1.0, 22.5, 1.0), "auto": cell(0.13, 4.4, 0.03)},
    },
    "after_bpo": {
        "easy": {"direct": cell(0.996, 4.0, 0.0), "thinking": cell(0.95, 11.7, 1.0), "auto": cell(0.996, 4.0, 0.0)},
        "hard": {"direct": cell(0.125, 4.0, 0.0), "thinking": cell(1.0, 22.5, 1.0), "auto": cell(1.0, 22.5, 1.0)},
    },
    "seconds": {"pretrain": 12.0, "anneal": 48.0, "bpo": 25.0},
    "peak_rss_gb": 0.9,
}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def filled_run(tmp_path: Path) -> Callable[..., Path]:
    """``filled_run(question=...)`` writes a run of its own."""
    return lambda **options: fill_run(tmp_path / "run", **options)


@pytest.fixture
def tokens() -> ModeTokens:
    return TOKENS


@pytest.fixture
def rollout() -> Callable[..., Rollout]:
    return make_rollout


@pytest.fixture
def sample() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture
def group() -> Callable[..., Group]:
    return make_group

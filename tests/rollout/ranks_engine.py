"""Qwen3-VL's rollouts under layouts of several ranks are those of one rank. Run by test_layouts.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.models.families import build_model, resolve
from r4b_core.models.qwen3_vl.model import build_model as build_chunk
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt
from r4b_core.modes import ModeTokens
from r4b_core.parallel.runtime import start
from r4b_core.rollout.engine import EmbeddedEngine, bimode_requests
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Rollout, SamplingParams

TWO_RANKS = {
    "tp2": ParallelConfig(tp=2),
    "tp2_sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "pp2_interleaved": ParallelConfig(pp=2, virtual_stages=2),
}
FOUR_RANKS = {
    "tp2_pp2": ParallelConfig(tp=2, pp=2),
    "tp2_pp2_interleaved": ParallelConfig(tp=2, pp=2, virtual_stages=2),
}
LAYOUTS = FOUR_RANKS if os.environ.get("WORLD_SIZE") == "4" else TWO_RANKS
# Heads that two ranks share, and layers for four chunks with DeepStack's in the first.
MODEL = ModelConfig(family="qwen3_vl", shape=dict(num_layers=8, tie_embeddings=False, init_std=0.2, patch_size=4))
MODES = ModeTokens(think_open=3, think_close=4, newline=5, blank_line=6, turn_end=2)


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[None]:
    """Each test starts layouts of its own."""
    yield


def prompt(text: int, grids: list[tuple[int, int]]) -> Qwen3VLPrompt:
    """Images of so many (rows, columns) of patches, the given number of text tokens before each and at the end."""
    generator, patches = torch.Generator().manual_seed(text), sum(rows * columns for rows, columns in grids)
    index, first = [], 0
    for rows, columns in grids:
        index += [*[-1] * text, *range(first, first + rows * columns, 4)]
        first += rows * columns
    index += [-1] * text
    return Qwen3VLPrompt(
        torch.randint(0, 60, (len(index),), generator=generator),
        torch.tensor(index),
        torch.randn(patches, resolve(MODEL).patch_dim, generator=generator),
        torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64).view(-1, 3),
    )


def rollouts(layout: ParallelConfig) -> list[Rollout]:
    runtime = start(layout, seed=1)
    try:
        model: Any = build_model(MODEL, layout, seed=3)
        if layout.virtual_stages > 1:
            model = [build_chunk(MODEL, layout, 3, chunk) for chunk in range(layout.virtual_stages)]
        prompts = [prompt(5, []), prompt(3, [(4, 6)]), prompt(2, [(2, 4), (6, 2)])]
        requests = bimode_requests(len(prompts), 2, False, lambda prompt, k: request_seed(prompt, k))
        engine = EmbeddedEngine(model, MODES, 60, batch=5, prefill_tokens=20)
        drawn = engine.generate(prompts, requests, SamplingParams(12))
        (first,) = {rollout.thinking_probability for rollout in drawn[:4]}
        stream = engine.stream(prompts[0], requests[0], SamplingParams(12))
        assert stream.thinking_probability == pytest.approx(first, rel=1e-4)
        assert list(stream) == drawn[0].tokens
        return drawn
    finally:
        runtime.stop()


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_rollouts_are_those_of_one_rank(name: str) -> None:
    for one, many in zip(rollouts(ParallelConfig()), rollouts(LAYOUTS[name]), strict=True):
        assert one.tokens == many.tokens
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(many.logprobs), atol=1e-5, rtol=0)

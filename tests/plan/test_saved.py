"""Planned activations against what autograd really saves in our model: a layer more, over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.parallel.runtime import start
from r4b_core.plan.memory import alive_micro_batches, layer_bytes, vision_layer_bytes
from r4b_core.plan.shapes import r4b_shape
from r4b_core.plan.work import RECOMPUTE, Layout, Recompute
from tests.models.build import SMALL, one_batch, random_prompt
from tests.models.kept import kept_bytes

DECODER = dict(hidden_size=128, ffn_hidden_size=384, num_heads=8, num_kv_heads=2, head_dim=32)
VISION = dict(vision_hidden_size=96, vision_ffn_hidden_size=256, vision_num_heads=4, vision_grid=(20, 20))


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    place = start(ParallelConfig(), seed=0)
    yield
    place.stop()


def per_layer(field: str, recompute: Recompute, prompt: EncodedPrompt, **shape: Any) -> tuple[float, R4BModel]:
    """Bytes that the third layer adds to the second, and the model with three."""
    kept = []
    for layers in (2, 3):
        config = ModelConfig(shape={**SMALL, **shape, field: layers}, dtype="bfloat16")
        model = build_model(config, ParallelConfig(recompute=recompute), 0)
        kept.append(kept_bytes(model, one_batch(prompt, [1, 2, 3]))[1])
    return float(kept[1] - kept[0]), model


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_decoder_layer_saves_what_is_planned(recompute: Recompute) -> None:
    prompt = random_prompt(torch.Generator().manual_seed(0), 317)
    grown, model = per_layer("num_layers", recompute, prompt, **DECODER)
    decoder = r4b_shape("r4b", model.shape).decoder
    assert grown / 320 == pytest.approx(layer_bytes(decoder, recompute, 1, False), rel=0.02)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_layer_of_the_vision_tower_saves_what_is_planned(recompute: Recompute) -> None:
    prompt = random_prompt(torch.Generator().manual_seed(0), 4, [(20, 20)])
    grown, model = per_layer("vision_num_layers", recompute, prompt, **VISION)
    vision = r4b_shape("r4b", model.shape).vision
    assert vision is not None
    assert grown / 400 == pytest.approx(vision_layer_bytes(vision, recompute, 1), rel=0.02)


@pytest.mark.parametrize(("micro_batches", "chunks"), [(8, 1), (8, 2), (16, 3), (2, 1), (4, 2)])
def test_micro_batches_alive_are_those_of_the_schedule(micro_batches: int, chunks: int) -> None:
    """Megatron-Core's own table walked through, one forward one backward after the warm-up, on four stages."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, 4 if chunks > 1 else micro_batches)]
    for stage in range(4):
        ahead = (3 - stage) * 2 + (chunks - 1) * 4 if chunks > 1 else 3 - stage
        most, most_first = 0, 0
        for step in range(max(1, len(order) - ahead)):
            forward, backward = order[: ahead + step + 1], [chunks - 1 - chunk for chunk in order[:step]]
            held = [forward.count(chunk) - backward.count(chunk) for chunk in range(chunks)]
            most, most_first = max(most, sum(held)), max(most_first, held[0])
        alive, first = alive_micro_batches(Layout(pp=4, interleave=chunks), micro_batches, stage)
        assert (alive * chunks, first) == (most, most_first)

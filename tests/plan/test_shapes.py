"""Parameter counts against published ones and against our own model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from r4b_core.config.recipe import ParallelConfig
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.models.r4b.config import SIZES
from r4b_core.models.r4b.flops import attention_pairs
from r4b_core.models.r4b.flops import forward_flops as counted_flops
from r4b_core.parallel.runtime import start
from r4b_core.plan.shapes import SHAPES, r4b_shape
from r4b_core.plan.work import Work, causal_pairs, forward_flops, step_flops
from tests.models.build import random_prompt, small_model

# The totals of the checkpoints' safetensors files, as their model pages state them.
PUBLISHED = {
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5_vl-7b": 8_292_166_656,
    "qwen3-4b": 4_022_468_096,
    "qwen3_vl-2b": 2_127_532_032,
    "qwen3_vl-4b": 4_437_815_808,
    "qwen3_vl-8b": 8_767_123_696,
}


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    place = start(ParallelConfig(), seed=0)
    yield
    place.stop()


def test_every_shape_has_its_published_count() -> None:
    assert {name: shape.parameters for name, shape in SHAPES.items()} == PUBLISHED


def test_r4b_has_the_decoder_of_qwen3_4b() -> None:
    shape = r4b_shape("r4b-4b", SIZES["4b"])
    assert shape.decoder == SHAPES["qwen3-4b"].decoder
    assert shape.decoder.parameters == PUBLISHED["qwen3-4b"]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "num_layers": 3}])
def test_r4b_count_is_that_of_the_model_we_train(world_of_one: None, changes: dict[str, object]) -> None:
    model = small_model(**changes)
    assert r4b_shape("r4b", model.shape).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("share", [True, False])
def test_flops_are_those_counted_on_real_batches(share: bool) -> None:
    config = dataclasses.replace(SIZES["toy"], num_layers=3)
    generator = torch.Generator().manual_seed(0)
    prompts = [random_prompt(generator, 3, [(2, 3), (3, 4)], 2), random_prompt(generator, 6)]
    groups = [[Response([1] * n) for n in (5, 1, 3)], [Response([2] * 4)]]
    (batches,) = pack_groups_for_rl(prompts, groups, 256, share_prefix=share)
    work = Work(
        micro_batches=1,
        tokens=sum(int(batch.layout.offsets[-1]) for batch in batches),
        pairs=sum(attention_pairs(batch.layout) for batch in batches),
        loss_rows=sum(batch.num_rows for batch in batches),
        patches=sum(len(batch.patches) for batch in batches),
        vision_pairs=config.vision_num_layers * sum(int((batch.image_grid.prod(1) ** 2).sum()) for batch in batches),
    )
    counted = counted_flops(config, batches)
    flops = forward_flops(r4b_shape("r4b", config), work)
    assert (flops.linear, flops.attention, flops.head, flops.projector) == (
        counted.linear,
        counted.attention,
        counted.head,
        counted.projector,
    )
    assert flops.vision + flops.vision_attention == counted.vision
    assert step_flops(r4b_shape("r4b", config), work) == counted.update()


def test_windows_bound_the_pairs_of_an_image() -> None:
    vision = SHAPES["qwen2.5_vl-7b"].vision
    assert vision is not None
    assert vision.attention_pairs(1024) == 1024 * (28 * 64 + 4 * 1024)
    assert vision.attention_pairs(16) == 16 * 16 * 32


def test_causal_pairs_are_a_triangle_per_sequence() -> None:
    assert causal_pairs(12, 4) == 3 * (1 + 2 + 3 + 4)

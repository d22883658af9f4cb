"""Layouts that cannot work are refused from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from r4b_core.config.layout import Layout, check_layout, world_size_from_environment
from r4b_core.config.load import RecipeError, load_recipe
from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.models.families import build_model, resolve
from r4b_core.models.qwen3_vl.config import SIZES
from r4b_core.parallel.runtime import start

SIZES_8B = SIZES["8b"]


@dataclass(frozen=True)
class Shape:
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    vision_num_heads: int = 16
    vocab_size: int = 151936


def layout(world_size: int, *overrides: str, shape: Any = None) -> Layout:
    return check_layout(load_recipe("demo", overrides).recipe, world_size, shape or Shape())


def test_data_parallelism_is_what_is_left() -> None:
    assert layout(16, "parallel.tp=2", "parallel.pp=2", "parallel.cp=2") == Layout(2, 2, 2, 2)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ["parallel.tp=2"], r"tp 2 x pp 1 x cp 1 needs a multiple of 2 ranks, there are 3: .*nproc-per-node=2"),
        (
            16,
            ["parallel.tp=16"],
            r"parallel\.tp = 16: does not divide the 8 key-value heads; possible are 1, 2, 4, 8, the nearest is 8$",
        ),
        (16, ["parallel.tp=4", "parallel.cp=4"], r"parallel\.tp \* parallel\.cp = 16: .*8 key-value heads"),
        (5, ["parallel.pp=5"], r"parallel\.pp = 5: does not divide the 36 layers of the decoder; .*the nearest is 4$"),
        (
            4,
            ["parallel.pp=4", "parallel.virtual_stages=2"],
            r"parallel\.virtual_stages = 2: does not divide the 9 layers of a stage \(pp 4\); .*the nearest is 1$",
        ),
        (32, [], r"bpo\.prompts = 16: less than one for each of the 32 data-parallel ranks; take 32 or more"),
        (
            8,
            ["parallel.tp=8", "parallel.sequence_parallel=true", "packing.capacity=1004"],
            r"packing\.capacity = 1004: .*cut into 8 equal pieces.*the nearest possible is 1008$",
        ),
    ],
)
def test_impossible_layouts(world_size: int, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        layout(world_size, *overrides)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        (Shape(num_layers=18), ["parallel.tp=32"], r"parallel\.tp = 32: .* 16 attention heads of the vision tower"),
        (Shape(vocab_size=151937), ["parallel.tp=2"], r"parallel\.tp = 2: .* 151937 entries of the vocabulary"),
        (
            replace(SIZES_8B, num_heads=64, num_kv_heads=64, vision_num_heads=32, vision_hidden_size=1152 * 2),
            ["parallel.tp=32"],
            r"parallel\.tp = 32: .* 4304 columns of the vision tower's MLP; .*the nearest is 16$",
        ),
        (
            SIZES_8B,
            ["parallel.pp=18"],
            r"parallel\.pp = 18: .* has 2 of 36 layers, and DeepStack adds to the first 3.*nearest possible is 12$",
        ),
        (
            SIZES_8B,
            ["parallel.pp=6", "parallel.virtual_stages=3"],
            r"parallel\.pp \* virtual_stages = 18: .* has 2 of 36 layers.*nearest possible is 12$",
        ),
    ],
)
def test_what_a_model_does_not_allow(shape: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        layout(64, *overrides, "bpo.freeze=[]", "anneal.optim.lr_scale={}", "bpo.steps=0", shape=shape)


def test_interleaving_and_recomputation_of_8b() -> None:
    overrides = ["parallel.pp=4", "parallel.virtual_stages=3", "parallel.recompute=full"]
    assert layout(8, *overrides, shape=SIZES_8B) == Layout(1, 4, 1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "anneal.optim.lr_scale={visoin: 0.1}",
            r"anneal\.optim\.lr_scale names 'visoin': did you mean vision\? The parts of this model are vision, embed",
        ),
        (
            "bpo.optim.constant=[projector]",
            r"bpo\.optim\.constant names 'projector': .* vision, embedding, decoder, out",
        ),
        ("bpo.freeze=[visual.blocks]", r"bpo\.freeze names 'visual\.blocks': did you mean vision\?"),
    ],
)
def test_parts_that_the_model_does_not_have(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        layout(1, override, shape=SIZES_8B)
    assert len(caught.value.problems) == 1


def test_parts_of_a_stage_without_steps_do_not_matter() -> None:
    assert layout(1, "bpo.freeze=[visual]", "bpo.steps=0", shape=SIZES_8B) == Layout(1, 1, 1, 1)


@pytest.mark.parametrize("family", ["r4b", "qwen3_vl"])
@pytest.mark.parametrize("tie", [True, False])
def test_parts_are_those_of_the_parameters(family: str, tie: bool) -> None:
    config = ModelConfig(family=family, shape={"tie_embeddings": tie})
    place = start(ParallelConfig(), seed=0)
    names = {name.split(".")[0] for name, _ in build_model(config, ParallelConfig(), 0).named_parameters()}
    place.stop()
    assert names == set(resolve(config).parts)


def test_all_that_does_not_divide_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        layout(4, "parallel.tp=3", shape=Shape(num_kv_heads=8))
    assert len(caught.value.problems) == 6


def test_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_environment() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size_from_environment() == 6

"""Layouts that cannot work are refused from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from r4b_core.config.layout import Layout, check_layout, world_size_from_environment
from r4b_core.config.load import RecipeError, load_recipe


@dataclass(frozen=True)
class Shape:
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    vision_num_heads: int = 16
    vocab_size: int = 151936


def layout(world_size: int, *overrides: str, shape: Shape | None = None) -> Layout:
    return check_layout(load_recipe("demo", overrides).recipe, world_size, shape or Shape())


def test_data_parallelism_is_what_is_left() -> None:
    assert layout(16, "parallel.tp=2", "parallel.pp=2", "parallel.cp=2") == Layout(2, 2, 2, 2)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ["parallel.tp=2"], r"tp 2 x pp 1 x cp 1 needs a multiple of 2 ranks, there are 3: .*nproc-per-node=2"),
        (16, ["parallel.tp=16"], r"parallel\.tp = 16: does not divide the 8 key-value heads; possible are 1, 2, 4, 8$"),
        (16, ["parallel.tp=4", "parallel.cp=4"], r"parallel\.tp \* parallel\.cp = 16: .*8 key-value heads"),
        (5, ["parallel.pp=5"], r"parallel\.pp = 5: does not divide the 36 layers of the decoder"),
        (
            8,
            ["parallel.tp=8", "parallel.sequence_parallel=true", "packing.capacity=1004"],
            r"packing\.capacity = 1004: .*cut into 8 equal pieces.*take 1008$",
        ),
    ],
)
def test_impossible_layouts(world_size: int, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        layout(world_size, *overrides)
    assert len(caught.value.problems) == 1


def test_all_that_does_not_divide_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        layout(4, "parallel.tp=3", shape=Shape(num_kv_heads=8))
    assert len(caught.value.problems) == 5


def test_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_environment() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size_from_environment() == 6

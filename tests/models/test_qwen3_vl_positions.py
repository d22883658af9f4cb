"""M-RoPE positions against transformers' `Qwen3VLModel.get_rope_index`."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt, mrope_positions

Grid = tuple[int, int, int]


def layout(rng: random.Random, merge: int) -> tuple[list[bool], list[Grid]]:
    """Runs of text (at least one token between two images) and images, beginning and ending with either."""
    is_image: list[bool] = []
    grids: list[Grid] = []
    for number in range(rng.randint(0, 4)):
        is_image += [False] * rng.randint(1 if number else 0, 7)
        grid = (1, merge * rng.randint(1, 6), merge * rng.randint(1, 6))
        is_image += [True] * (grid[1] * grid[2] // merge**2)
        grids.append(grid)
    is_image += [False] * rng.randint(0 if grids else 1, 9)
    return is_image, grids


def theirs(is_image: list[bool], grids: list[Grid], merge: int) -> tuple[torch.Tensor, int]:
    model = object.__new__(Qwen3VLModel)
    object.__setattr__(model, "config", SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge)))
    kinds = torch.tensor([is_image], dtype=torch.int64)
    grid = torch.tensor(grids).view(-1, 3) if grids else None
    positions, delta = Qwen3VLModel.get_rope_index(model, kinds, kinds, grid)
    return positions[:, 0], int(delta) + len(is_image)


@pytest.mark.parametrize("seed", range(200))
def test_positions_equal_transformers(seed: int) -> None:
    rng = random.Random(seed)
    merge = rng.choice((1, 2, 2, 3))
    is_image, grids = layout(rng, merge)
    want, next_position = theirs(is_image, grids, merge)
    got, following = mrope_positions(torch.tensor(is_image), torch.tensor(grids, dtype=torch.int64).view(-1, 3), merge)
    assert torch.equal(got, want) and got.dtype == torch.int64
    assert following == next_position


def test_images_that_touch_are_told_apart_by_their_grids() -> None:
    positions, following = mrope_positions(torch.ones(3, dtype=torch.bool), torch.tensor([[1, 2, 4], [1, 2, 2]]))
    assert positions.tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]
    assert following == 3


def test_a_prompt_has_the_positions_of_its_tokens() -> None:
    prompt = Qwen3VLPrompt(
        tokens=torch.zeros(6, dtype=torch.int64),
        vision_index=torch.tensor([-1, 0, 4, 8, 12, -1]),
        patches=torch.zeros(16, 3),
        image_grid=torch.tensor([[1, 4, 4]]),
    )
    assert prompt.position_ids.tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert prompt.next_position == 4


@pytest.mark.parametrize(
    ("is_image", "grid", "message"),
    [
        ([True, True], [[2, 2, 2]], "image 0 has 2 frames: videos are not supported"),
        ([True], [[1, 2, 3]], "image 0 is 2 x 3 patches: both must be positive multiples of 2"),
        ([True], [[1, 0, 2]], "image 0 is 0 x 2 patches"),
        ([True, False], [[1, 2, 4]], "has 1 image tokens and its 1 grids stand for 2"),
        ([True, False], [], "has 1 image tokens and its 0 grids stand for 0"),
        ([True, True, False, True], [[1, 2, 2], [1, 2, 4]], "tokens of image 1 do not lie side by side"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(is_image: list[bool], grid: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(torch.tensor(is_image), torch.tensor(grid, dtype=torch.int64).view(-1, 3))

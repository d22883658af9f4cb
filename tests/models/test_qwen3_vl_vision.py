"""The vision tower against transformers' `Qwen3VLVisionModel` with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.models.qwen3_vl.config import Qwen3VLConfig, resolve
from r4b_core.models.qwen3_vl.vision import VisionTower, bilinear_taps, patch_places
from tests.models.build import assert_same_gradients, gradients
from tests.models.qwen3_vl_oracle import SMALL, make_oracle, random_prompt, their_patches, vision_to_megatron

# A single block, one smaller than the position table, a tall and a wide one, one larger than the table.
GRIDS = {"block": [(2, 2)], "one": [(4, 2)], "two": [(6, 2), (2, 8)], "large": [(8, 6), (2, 2), (4, 10)]}


def pair(**shape: object) -> tuple[VisionTower, Qwen3VLVisionModel, Qwen3VLConfig]:
    config = resolve(ModelConfig(shape={**SMALL, **shape}))
    theirs = make_oracle(config).model.visual
    tower = VisionTower(config, ParallelConfig(), "float32")
    weights = vision_to_megatron(dict(theirs.named_parameters()), config)
    assert weights.keys() == dict(tower.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.copy_(weights[name])
    return tower, theirs, config


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_tower_equals_transformers(grids: list[tuple[int, int]]) -> None:
    tower, theirs, config = pair()
    prompt = random_prompt(torch.Generator().manual_seed(0), config, 1, grids)
    sizes = prompt.image_grid.prod(1)
    cu_patches = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    got = tower(prompt.patches, prompt.image_grid, cu_patches)
    outputs = theirs(their_patches(prompt.patches, config), prompt.image_grid)
    want = outputs.pooler_output, torch.stack(outputs.deepstack_features)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in want]
    for mine, other in zip(got, want, strict=True):
        assert other.abs().max() > 1
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)

    for outputs in (got, want):
        sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True)).backward()
    wanted = vision_to_megatron({name: p.grad for name, p in theirs.named_parameters()}, config)
    assert_same_gradients(gradients(tower), wanted, 1e-4)


def test_a_tower_without_deepstack() -> None:
    tower, theirs, config = pair(deepstack_layers=())
    prompt = random_prompt(torch.Generator().manual_seed(0), config, 1, [(2, 4)])
    features, stack = tower(prompt.patches, prompt.image_grid, torch.tensor([0, 8], dtype=torch.int32))
    want = theirs(their_patches(prompt.patches, config), prompt.image_grid).pooler_output
    torch.testing.assert_close(features, want, rtol=1e-5, atol=1e-5)
    assert stack.shape == (0, 2, 48)


def test_an_image_as_large_as_the_position_table_takes_its_entries_as_they_are() -> None:
    places = patch_places(torch.tensor([[1, 4, 4]]), 2)
    index, weight = bilinear_taps(places, 4)
    assert torch.equal(index[:, 0], places.row * 4 + places.column)
    assert torch.equal(weight, torch.tensor([1.0, 0, 0, 0]).expand(16, 4))
    assert index[:5, 0].tolist() == [0, 1, 4, 5, 2], "patches lie block by block"


def test_patches_with_all_frames_are_taken_as_they_are() -> None:
    tower, _, config = pair()
    prompt = random_prompt(torch.Generator().manual_seed(0), config, 1, [(2, 4)])
    cu_patches = torch.tensor([0, 8], dtype=torch.int32)
    one, both = (
        tower(patches, prompt.image_grid, cu_patches)[0]
        for patches in (prompt.patches, their_patches(prompt.patches, config))
    )
    assert torch.equal(one, both)
    with pytest.raises(ValueError, match="patches have 147 values, expected 48 .* or 2 times as many"):
        tower(torch.zeros(8, 147), prompt.image_grid, cu_patches)


def test_grids_that_do_not_fit_are_refused() -> None:
    tower, _, config = pair()
    cu_patches = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="image 0 is 3 x 2 patches: both must be positive multiples of 2"):
        tower(torch.zeros(6, config.patch_dim), torch.tensor([[1, 3, 2]]), cu_patches)
    with pytest.raises(ValueError, match="videos are not supported"):
        tower(torch.zeros(8, config.patch_dim), torch.tensor([[2, 2, 2]]), cu_patches)

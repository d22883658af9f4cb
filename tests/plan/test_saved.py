"""Planned activations against what autograd really saves in our model: a layer more, over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import ParallelConfig
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.model import R4BModel
from r4b_core.parallel.runtime import start
from r4b_core.plan.memory import layer_bytes, vision_layer_bytes
from r4b_core.plan.shapes import r4b_shape
from tests.models.build import one_batch, random_prompt, small_model

DECODER = dict(hidden_size=128, ffn_hidden_size=384, num_heads=8, num_kv_heads=2, head_dim=32)
VISION = dict(vision_hidden_size=96, vision_ffn_hidden_size=256, vision_num_heads=4, vision_grid=(20, 20))


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    place = start(ParallelConfig(), seed=0)
    yield
    place.stop()


def saved_bytes(model: R4BModel, prompt: EncodedPrompt) -> int:
    """Of all storages kept for the backward, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is given away twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(one_batch(prompt, [1, 2, 3]))
    return sum(sizes.values())


def per_layer(field: str, prompt: EncodedPrompt, **shape: Any) -> tuple[float, R4BModel]:
    """Bytes that the third layer adds to the second, and the model with three."""
    two, three = (small_model(dtype=torch.bfloat16, **{**shape, field: layers}) for layers in (2, 3))
    return float(saved_bytes(three, prompt) - saved_bytes(two, prompt)), three


def test_a_decoder_layer_saves_what_is_planned() -> None:
    prompt = random_prompt(torch.Generator().manual_seed(0), 317)
    grown, model = per_layer("num_layers", prompt, **DECODER)
    decoder = r4b_shape("r4b", model.shape).decoder
    # The CPU's attention lays its output out heads first; making rows of it is a copy that GPUs do not need.
    copy = 2 * decoder.query_size
    assert grown / 320 == pytest.approx(layer_bytes(decoder, "none", 1, False) + copy, rel=0.01)


def test_a_layer_of_the_vision_tower_saves_what_is_planned() -> None:
    prompt = random_prompt(torch.Generator().manual_seed(0), 4, [(20, 20)])
    grown, model = per_layer("vision_num_layers", prompt, **VISION)
    vision = r4b_shape("r4b", model.shape).vision
    assert vision is not None
    assert grown / 400 == pytest.approx(vision_layer_bytes(vision, "none", 1), rel=0.01)

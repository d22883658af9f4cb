"""The model against transformers' classes with the same weights: logits and the gradient of every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.models.r4b.config import resolve
from r4b_core.models.r4b.model import R4BModel, build_model
from tests.models.build import SMALL, assert_same_gradients, gradients, random_prompt, random_tokens
from tests.models.oracle import Oracle, make_oracle, to_megatron


def pair(tie: bool) -> tuple[R4BModel, Oracle]:
    config = ModelConfig(shape={**SMALL, "tie_embeddings": tie})
    oracle = make_oracle(resolve(config))
    model = build_model(config, ParallelConfig(), seed=0)
    weights = to_megatron(dict(oracle.named_parameters()), oracle.shape)
    assert weights.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model, oracle


def compare(model: R4BModel, oracle: Oracle, batch: PackedBatch, items: list[tuple[EncodedPrompt, list[int]]]) -> None:
    """Logits to 1e-5 and, through a random linear function of them, every parameter's gradient to 1e-4."""
    logits = model(batch) @ model.head_weight().T
    want = torch.cat([oracle(prompt, response) for prompt, response in items])
    assert want.abs().max() > 1
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)

    weight = torch.randn(logits.shape)
    (logits * weight).sum().backward()
    (want * weight).sum().backward()
    theirs: dict[str, Tensor] = {
        name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None
    }
    got = gradients(model)
    if not len(batch.patches):
        assert not any(got.pop(name).any() for name in list(got) if name.startswith(("vision", "projector", "image")))
        theirs = {**{name: torch.zeros_like(p) for name, p in oracle.named_parameters()}, **theirs}
    wanted = to_megatron(theirs, oracle.shape)
    assert_same_gradients(got, {name: wanted[name] for name in got}, 1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_packed_text_equals_qwen3_one_by_one(tie: bool) -> None:
    model, oracle = pair(tie)
    generator = torch.Generator().manual_seed(1)
    items = [(random_prompt(generator, n), random_tokens(generator, m)) for n, m in ((5, 9), (1, 1), (12, 4))]
    ((batch,),) = pack_groups_for_rl(
        [prompt for prompt, _ in items], [[Response(tokens)] for _, tokens in items], 64, share_prefix=False, pad_to=64
    )
    compare(model, oracle, batch, items)


@pytest.mark.parametrize("share", [True, False])
def test_images_and_shared_prompts_equal_siglip_projector_qwen3(share: bool) -> None:
    model, oracle = pair(tie=True)
    generator = torch.Generator().manual_seed(2)
    # The full position table, a part of it, two images in one prompt, and none.
    prompts = [
        random_prompt(generator, 2, [(3, 4)], 3),
        random_prompt(generator, 1, [(2, 3), (1, 2)], 2),
        random_prompt(generator, 6),
    ]
    groups = [[random_tokens(generator, n) for n in lengths] for lengths in ((7, 1, 3), (4, 2), (5,))]
    ((batch,),) = pack_groups_for_rl(prompts, [[Response(r) for r in g] for g in groups], 256, share_prefix=share)
    assert (batch.layout.parent >= 0).any() == share
    compare(model, oracle, batch, [(p, r) for p, group in zip(prompts, groups, strict=True) for r in group])


def test_an_image_larger_than_the_position_table_is_refused() -> None:
    model, _ = pair(tie=True)
    prompt = random_prompt(torch.Generator(), 1, [(2, 5)])
    ((batch,),) = pack_groups_for_rl([prompt], [[Response([1])]], 64)
    with pytest.raises(ValueError, match=r"2 x 5 patches.*table has 3 x 4.*tiles"):
        model(batch)

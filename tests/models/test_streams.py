"""What a forward pass meets besides weights: batches without images or without anything, padding, several images."""

from __future__ import annotations

import torch

from r4b_core.config.recipe import BpoConfig
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import PolicyHead, sft_head
from r4b_core.models.streams import context_chunk, pad_to_multiple
from tests.models.build import gradients, one_batch, random_prompt, random_tokens, small_model


def test_a_batch_without_images_gives_every_parameter_a_gradient() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    batch = one_batch(random_prompt(generator, 6), random_tokens(generator, 4))
    assert batch.patches.shape == (0, 48)
    loss, _, _ = sft_head(model, batch, model(batch))
    loss.backward()
    for name, gradient in gradients(model).items():
        seen = not name.startswith(("vision", "projector", "image_newline"))
        assert bool(gradient.any()) == seen, name


def test_a_batch_of_padding_alone_has_no_loss_and_zero_gradients() -> None:
    """What a data-parallel rank gets that has nothing to do in a step."""
    model = small_model()
    ((batch,),) = pack_groups_for_rl([], [], 32, pad_to=32)
    columns = ("old_logprob", "advantage", "share")
    batch.row_data = {name: torch.zeros(0) for name in columns}
    batch.patches = torch.zeros(0, 48)
    for head in (sft_head, PolicyHead(BpoConfig(kl_coef=0)), PolicyHead(BpoConfig(algorithm="gspo", kl_coef=0))):
        loss, denominator, metrics = head(model, batch, model(batch))
        loss.backward()
        assert loss == denominator == metrics["rows"] == 0
        assert not any(gradient.any() for gradient in gradients(model).values())


def test_padding_changes_nothing() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    prompt, response = random_prompt(generator, 2, [(2, 2)]), random_tokens(generator, 5)
    hidden = []
    for pad_to in (None, 40):
        ((batch,),) = pack_groups_for_rl([prompt], [[Response(response)]], 40, pad_to=pad_to, pad_token=7)
        hidden.append(model(batch).detach())
    torch.testing.assert_close(*hidden, rtol=1e-6, atol=1e-6)


def test_two_images_do_not_see_each_other() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    prompt = random_prompt(generator, 1, [(2, 3), (3, 2)])
    batch = one_batch(prompt, [1])
    together = model.embed_images(batch.patches, batch.image_grid, batch.cu_patches)[:-1]
    cu = torch.tensor([0, 6], dtype=torch.int32)
    apart = [
        model.embed_images(batch.patches[i * 6 : i * 6 + 6], batch.image_grid[i : i + 1], cu)[:-1] for i in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_chunks_and_padding() -> None:
    assert context_chunk(12, None) == (0, 12)
    assert torch.equal(pad_to_multiple(torch.ones(5, 2), 4), torch.cat([torch.ones(5, 2), torch.zeros(3, 2)]))
    x = torch.ones(8)
    assert pad_to_multiple(x, 4) is x

"""The proof behind shared prompts: packed with sharing = packed without = one by one, loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import BpoConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import HeadOutput, PolicyHead, row_logprobs, sft_head
from r4b_core.losses.policy import response_row_weights
from r4b_core.models.r4b.model import R4BModel
from tests.models.build import assert_same_gradients, gradients, one_batch, random_prompt, random_tokens, small_model

Head = Callable[[R4BModel, PackedBatch, Tensor], HeadOutput]

# The clip range of the sequence ratio is wide here, so that some responses are clipped and some are not.
HEADS: dict[str, Head] = {
    "sft": sft_head,
    "bpo": PolicyHead(BpoConfig(kl_coef=0.1)),
    "bpo_exclude": PolicyHead(BpoConfig(kl_coef=0.1, mode_token_loss="exclude", temperature=0.7)),
    "gspo": PolicyHead(BpoConfig(algorithm="gspo", clip_low=0.1, clip_high=0.1, kl_coef=0.1)),
    "dr_grpo": PolicyHead(BpoConfig(algorithm="dr_grpo", kl_coef=0.0, mode_token_weight=3.0)),
}


def groups_of(model: R4BModel, config: BpoConfig) -> tuple[list[EncodedPrompt], list[list[Response]]]:
    """Groups as BPO has them: two images of different sizes, one image, none; thinking, direct and one-token responses.

    The policy that drew the responses, and the reference, are a little off the model.
    """
    generator = torch.Generator().manual_seed(3)
    prompts = [
        random_prompt(generator, 2, [(2, 3), (3, 4)], 3),
        random_prompt(generator, 7),
        random_prompt(generator, 1, [(3, 2)], 2),
    ]
    lengths = [(9, 14, 2, 3), (11, 1, 4), (6, 5, 3, 3, 2)]
    flat = torch.tensor([n for group in lengths for n in group])
    forced = torch.where(flat > 4, 1, 2).minimum(flat)
    weights = response_row_weights(
        flat, config.mode_token_weight, forced, config.mode_token_loss == "include", config.reduction, 16
    )
    rows = zip(weights.weight.split(flat.tolist()), weights.share.split(flat.tolist()), strict=True)
    groups = []
    for prompt, group in zip(prompts, lengths, strict=True):
        responses = []
        for length in group:
            tokens = random_tokens(generator, length)
            batch = one_batch(prompt, tokens)
            with torch.no_grad():
                logprob = row_logprobs(model, batch, model(batch), config.temperature).float()
            weight, share = next(rows)
            columns = {
                "old_logprob": (logprob + 0.2 * torch.randn(length, generator=generator)).tolist(),
                "ref_logprob": (logprob + 0.3 * torch.randn(length, generator=generator)).tolist(),
                "advantage": float(torch.randn((), generator=generator)),
                "share": share.tolist(),
            }
            responses.append(Response(tokens, weight.tolist(), columns))
        groups.append(responses)
    return prompts, groups


def layouts(prompts: list[EncodedPrompt], groups: list[list[Response]]) -> dict[str, list[PackedBatch]]:
    def pack(capacity: int, share: bool, pad_to: int | None = None) -> list[PackedBatch]:
        return pack_groups_for_rl(prompts, groups, capacity, share_prefix=share, pad_to=pad_to)[0]

    one_by_one = [
        pack_groups_for_rl([prompt], [[response]], 64, share_prefix=False)[0][0]
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    made = {
        "shared": pack(512, True, pad_to=512),
        "shared, cut into several batches": pack(64, True),
        "unshared": pack(512, False, pad_to=512),
        "one by one": one_by_one,
    }
    assert [len(batches) for batches in made.values()] == [1, len(made["shared, cut into several batches"]), 1, 12]
    assert len(made["shared, cut into several batches"]) > 1
    assert made["shared"][0].layout.offsets[-1] < 0.6 * made["unshared"][0].layout.offsets[-1]
    return made


def update(model: R4BModel, batches: list[PackedBatch], head: Head) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss and sums [1 + denominator + metrics], gradients) of one update over all batches."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        loss, denominator, metrics = head(model, batch, model(batch))
        loss.backward()
        for name, value in {"loss": loss.detach(), "denominator": denominator, **metrics}.items():
            total[name] = total.get(name, torch.zeros(())) + value
    return torch.stack(list(total.values())), gradients(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", HEADS)
def test_sharing_changes_neither_loss_nor_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    head = HEADS[name]
    model = small_model(dtype=dtype)
    config = head.config if isinstance(head, PolicyHead) else BpoConfig()
    results = {layout: update(model, batches, head) for layout, batches in layouts(*groups_of(model, config)).items()}
    sums, grads = results.pop("one by one")
    if isinstance(head, PolicyHead):
        assert 0 < sums[-2] < sums[-1], "some rows are clipped and some are not"
    for layout, (other_sums, other_grads) in results.items():
        torch.testing.assert_close(
            other_sums, sums, rtol=tolerance, atol=tolerance, msg=lambda m, at=layout: f"{at}: {m}"
        )
        assert_same_gradients(other_grads, grads, tolerance)

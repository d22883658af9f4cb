"""The FLOP count against torch's own counter, and its attention pairs against the mask itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.models.r4b.flops import Flops, attention_pairs, forward_flops
from r4b_kernels.layout import PrefixLayout
from tests.models.build import random_prompt, small_model


@pytest.mark.parametrize("share", [True, False])
def test_linear_layers_and_head_are_what_torch_counts(share: bool) -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    prompts = [random_prompt(generator, 3, [(2, 3), (3, 4)], 2), random_prompt(generator, 6)]
    groups = [[Response([1] * n) for n in (5, 1, 3)], [Response([2] * 4)]]
    (batches,) = pack_groups_for_rl(prompts, groups, 256, share_prefix=share)
    counter = FlopCounterMode(display=False)
    model.requires_grad_(False)
    with counter:
        for batch in batches:
            model(batch) @ model.head_weight().T
    got = forward_flops(model.shape, batches)
    # The counter does not see into the attention ops.
    vision_attention = 4 * (6**2 + 12**2) * 2 * 24
    assert counter.get_total_flops() == got.total - got.attention - vision_attention
    assert got.attention == 4 * sum(int(b.layout.dense_mask(b.num_tokens).sum()) for b in batches) * 3 * 4 * 16


def test_pairs_are_those_of_the_mask() -> None:
    layout = PrefixLayout.from_lengths([7, 3, 0, 5, 4, 2], [-1, 0, 0, -1, 3, 3])
    assert attention_pairs(layout) == int(layout.dense_mask(25).sum())


def test_an_update_is_three_forwards_and_one_where_frozen() -> None:
    flops = Flops(linear=10, attention=4, head=3, vision=2, projector=1)
    assert (flops + flops).total == 2 * flops.total == 40
    assert flops.update() == 60
    assert flops.update(vision_frozen=True) == 56

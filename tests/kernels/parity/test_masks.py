"""prefix_attention against shared-prefix attention that others wrote: attention-gym's masks and PrefixGrouper."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r4b_kernels import PrefixLayout, prefix_attention

masks = pytest.importorskip("attn_gym.masks", reason="attention-gym is an oracle, not a dependency")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
grouper = pytest.importorskip("prefix_grouper", reason="PrefixGrouper is an oracle, not a dependency")

GROUPS = [[5, 3, 1, 4], [1, 2], [7, 6, 6]]  # a prompt and its responses


def layout_of(groups: Sequence[Sequence[int]]) -> PrefixLayout:
    lengths, parents = [], []
    for group in groups:
        parents += [-1, *[len(lengths)] * (len(group) - 1)]
        lengths += group
    return PrefixLayout.from_lengths(lengths, parents)


def gym_mask(layout: PrefixLayout):
    """attention-gym names a document's prefix, and a prefix itself."""
    own = torch.arange(layout.num_segments)
    prefix = torch.where(layout.parent < 0, own, layout.parent.long())
    return masks.generate_shared_prefix_mask_mod(layout.offsets.long(), prefix)


def dense(mask_mod, tokens: int) -> Tensor:
    row = torch.arange(tokens)
    return mask_mod(torch.tensor(0), torch.tensor(0), row[:, None], row[None, :])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_dense_mask_is_that_of_attention_gym(groups: list[list[int]]) -> None:
    layout = layout_of(groups)
    tokens = sum(map(sum, groups))
    assert torch.equal(layout.dense_mask(tokens), dense(gym_mask(layout), tokens))


def test_varlen_mask_is_that_of_packed_documents() -> None:
    layout = PrefixLayout.from_lengths([5, 1, 9, 2])
    theirs = masks.generate_packed_causal_doc_mask_mod(layout.offsets.long())
    assert torch.equal(layout.dense_mask(17), dense(theirs, 17))


def inputs(tokens: int, heads: tuple[int, int] = (4, 2), dim: int = 16) -> list[Tensor]:
    shapes = [(tokens, heads[0], dim), (tokens, heads[1], dim), (tokens, heads[1], dim), (tokens, heads[0], dim)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=i < 3) for i, shape in enumerate(shapes)]


def test_values_are_those_of_flex_attention() -> None:
    layout = layout_of(GROUPS)
    tokens = sum(map(sum, GROUPS))
    q, k, v, _ = (x.detach() for x in inputs(tokens))
    block = flex.create_block_mask(gym_mask(layout), None, None, tokens, tokens, device="cpu")
    batched = [x.transpose(0, 1)[None].float() for x in (q, k, v)]
    theirs = flex.flex_attention(*batched, block_mask=block, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(prefix_attention(q, k, v, layout), theirs.double(), rtol=1e-5, atol=2e-6)


def test_gradients_are_those_of_sdpa_under_attention_gyms_mask() -> None:
    layout = layout_of(GROUPS)
    tokens = sum(map(sum, GROUPS))
    q, k, v, seed = inputs(tokens)
    ours = torch.autograd.grad(prefix_attention(q, k, v, layout), (q, k, v), seed)
    batched = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*batched, attn_mask=dense(gym_mask(layout), tokens), enable_gqa=True)
    theirs = torch.autograd.grad(out[0].transpose(0, 1), (q, k, v), seed)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)


def padded_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What PrefixGrouper calls: queries at the end of the keys, mask [b, keys] False in padding -> [b, q, heads, d]."""
    queries, keys = q.shape[2], k.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & mask.bool()[:, None, None, :]
    seen |= torch.eye(queries, keys, dtype=torch.bool).roll(keys - queries, 1)  # padding rows would be empty
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def test_values_and_gradients_are_those_of_prefix_grouper() -> None:
    layout, lengths = layout_of(GROUPS), [sum(group) for group in GROUPS]
    q, k, v, seed = inputs(sum(lengths))
    out = prefix_attention(q, k, v, layout)
    ours = (out, *torch.autograd.grad(out, (q, k, v), seed))

    theirs_of = grouper.PrefixGrouper([list(group) for group in GROUPS])
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    grouped = theirs_of.forward(padded_causal, *rows)[real]
    for mine, expected in zip(ours, (grouped, *torch.autograd.grad(grouped, (q, k, v), seed)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)

"""Prompts' keys and values keep with their prompts, however caches are cut and joined."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from r4b_core.rollout.cache import PromptCache, regroup, whole_vectors

LAYERS, HEADS, DIM = 2, 3, 8


def cache_of(ids: Sequence[int], sizes: Sequence[int]) -> PromptCache:
    """Every entry says its layer, prompt and column; unused columns are -1."""
    made = PromptCache(list(ids), list(sizes), [100 + prompt for prompt in ids])
    columns = torch.arange(whole_vectors(max(sizes)))
    for layer in range(LAYERS):
        entries = 10_000 * layer + 100.0 * torch.tensor(ids)[:, None] + columns
        entries[columns >= torch.tensor(sizes)[:, None]] = -1
        made.values.append(entries[None, :, :, None].expand(HEADS, -1, -1, DIM).contiguous())
        made.keys.append(entries[None, :, None].expand(HEADS, -1, DIM, -1).contiguous())
    return made


CACHES = [cache_of([3, 5, 4], [9, 2, 17]), cache_of([8, 1], [30, 4]), cache_of([7], [1])]
SIZES = {prompt: size for cache in CACHES for prompt, size in zip(cache.ids, cache.sizes, strict=True)}


@pytest.mark.parametrize("ids", [[1], [3, 4], [4, 3], [5, 8, 7, 3, 1, 4], [8, 5], [7, 1, 8]])
def test_prompts_of_several_caches(ids: list[int]) -> None:
    made = regroup(CACHES, ids)
    assert (made.ids, made.sizes, made.starts) == (ids, [SIZES[n] for n in ids], [100 + n for n in ids])
    columns = whole_vectors(max(made.sizes))
    for layer in range(LAYERS):
        assert made.keys[layer].shape == (HEADS, len(ids), DIM, columns) and made.keys[layer].is_contiguous()
        assert made.values[layer].shape == (HEADS, len(ids), columns, DIM) and made.values[layer].is_contiguous()
        for place, prompt in enumerate(ids):
            want = 10_000 * layer + 100.0 * prompt + torch.arange(SIZES[prompt])
            for got in (made.keys[layer][:, place].transpose(1, 2), made.values[layer][:, place]):
                assert torch.equal(got[:, : SIZES[prompt]], want[None, :, None].expand(HEADS, -1, DIM))
                assert got.isfinite().all()


def test_what_is_one_cache_already_is_not_copied() -> None:
    assert regroup(CACHES, [8, 1]) is CACHES[1]


def test_the_newest_of_two_entries_counts() -> None:
    again = cache_of([8, 3], [30, 9])
    again.values[0] += 0.5
    assert regroup([*CACHES, again], [3, 4]).values[0][0, 0, 0, 0] == 300.5

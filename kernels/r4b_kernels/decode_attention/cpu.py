"""decode_attention in torch's calls, as few as there can be: what one prompt's rows ask of its keys is one product.

Where all prompts have equally many rows, the rows are the grid [prompt, place] as they lie; else queries and results go
through an index.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Grid(NamedTuple):
    """How rows sorted by prompt stand in a grid of prompts and places.

    Attributes:
        width: places per prompt.
        prompt: int64 [N], each row's.
        rows: int64 [G * width], the row at each place, 0 where there is none; None where rows and places are the same.
        places: int64 [N], each row's place.
    """

    width: int
    prompt: Tensor
    rows: Tensor | None
    places: Tensor | None


# Keyed by content: the rows are the same for many steps and all layers.
@lru_cache(maxsize=8)
def _grid(offsets: tuple[int, ...]) -> _Grid:
    ends = torch.tensor(offsets, device="cpu")
    counts = ends.diff()
    width = int(counts.max())
    prompt = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    if bool((counts == width).all()):
        return _Grid(width, prompt, None, None)
    row = torch.arange(len(prompt), device="cpu")
    places = prompt * width + row - ends[:-1][prompt]
    rows = torch.zeros(len(counts) * width, dtype=torch.int64, device="cpu")
    rows[places] = row
    return _Grid(width, prompt, rows, places)


class Backend:
    """The cpu backend."""

    @staticmethod
    def forward(
        mixed: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rope: Tensor,
        column: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        prompt_lengths: Tensor,
        offsets: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        eps: float,
        scale: float,
    ) -> Tensor:
        rows, heads, each, dim = mixed.shape
        share, columns = each - 2, own_values.shape[2]
        if not rows:
            return mixed.new_empty(0, heads * share * dim)
        grid = _grid(tuple(offsets.tolist()))
        query = append(mixed, q_weight, k_weight, rope, column, own_keys, own_values, eps, scale)
        longest, filled = int(prompt_lengths.max()), min(max(int(column.max()), 0) + 1, columns)
        own_keys, own_values = (x.flatten(0, 1) for x in (own_keys[..., :filled], own_values[:, :, :filled]))
        prompt_keys, prompt_values = (
            x.flatten(0, 1) for x in (prompt_keys[..., :longest], prompt_values[:, :, :longest])
        )
        scores = torch.cat([_to_prompts(query, prompt_keys, heads, grid), torch.bmm(query, own_keys)], 2)
        mask(scores.view(heads, rows, share, -1), prompt_lengths[grid.prompt], longest, column, filled)
        probs = scores.softmax(2)
        out = _to_prompts(probs[..., :longest], prompt_values, heads, grid)
        out = torch.baddbmm(out, probs[..., longest:], own_values)
        return out.view(heads, rows, -1).transpose(0, 1).reshape(rows, -1)


def append(
    mixed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    column: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """The rows' queries [Hk * N, s, D], normed, turned and scaled; their keys and values go into the caches."""
    rows, heads, each, dim = mixed.shape
    share = each - 2
    weight = torch.cat([(q_weight * scale).expand(share, dim), k_weight[None]])
    normed = F.rms_norm(mixed.transpose(0, 1)[:, :, :-1], (dim,), None, eps) * weight
    same, rolled = rope[:, :, None].unbind()
    turned = torch.addcmul(normed * same, normed.roll(dim // 2, -1), rolled)
    place = column.clamp(0, own_values.shape[2] - 1)[:, None, None]
    own_keys.scatter_(3, place.expand(heads, rows, dim, 1), turned[:, :, share, :, None])
    own_values.scatter_(2, place.expand(heads, rows, 1, dim), mixed.transpose(0, 1)[:, :, -1:])
    return turned[:, :, :share].reshape(heads * rows, share, dim)


def _to_prompts(x: Tensor, right: Tensor, heads: int, grid: _Grid) -> Tensor:
    """x [Hk * N, s, K] times each row's own of right [Hk * G, K, L] -> [Hk * N, s, L]."""
    share, depth = x.shape[1:]
    if grid.rows is not None:
        x = x.view(heads, -1, share, depth).index_select(1, grid.rows)
    out = torch.bmm(x.reshape(len(right), grid.width * share, depth), right).view(-1, share, right.shape[2])
    if grid.places is not None:
        out = out.view(heads, -1, *out.shape[1:]).index_select(1, grid.places).flatten(0, 1)
    return out


def mask(scores: Tensor, lengths: Tensor, longest: int, column: Tensor, filled: int) -> None:
    """Take from scores [Hk, N, s, longest + filled] the columns that a row does not see."""
    unused = torch.arange(longest, device=scores.device) >= lengths[:, None]
    unwritten = torch.arange(filled, device=scores.device) > column[:, None]
    scores.masked_fill_(torch.cat([unused, unwritten], 1)[:, None], float("-inf"))

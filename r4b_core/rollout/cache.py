"""The key-value cache of the embedded engine: every prompt once, every response its own.

Shapes: G prompts, P longest prompt, N active requests, M longest response so far, Hq/Hk heads on this rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from r4b_kernels import prefix_attention
from r4b_kernels.layout import PrefixLayout


@dataclass
class PromptCache:
    """Keys and values of all prompts, per local layer.

    Attributes:
        keys: per layer [G, Hk, D, P] (transposed, as the product wants it).
        values: per layer [G, Hk, P, D].
        lengths: int64 [G].
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    lengths: Tensor = None  # type: ignore[assignment]


@dataclass
class PrefillStream:
    """Attends like training does and keeps the keys and values of every prompt (Megatron's ``packed_seq_params``).

    ``index`` int64 [G, P] is each prompt's token positions in the stream, padded with 0.
    """

    layout: PrefixLayout
    position_ids: Tensor
    index: Tensor
    cache: PromptCache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.keys.append(key[self.index].permute(0, 2, 3, 1).contiguous())
        self.cache.values.append(value[self.index].permute(0, 2, 1, 3).contiguous())
        return prefix_attention(query, key, value, self.layout)


class ResponseCache:
    """Keys and values of the active responses; rows move up when a response ends, so row n is always request n.

    A query reads its prompt's keys where they are: the queries of one prompt's responses are laid side by side, so the
    prompt's cache is never copied per response.
    """

    def __init__(self, prompts: PromptCache, rows: int, max_length: int) -> None:
        self.prompts = prompts
        self.keys = [self._empty(key, rows, max_length) for key in prompts.values]
        self.values = [self._empty(value, rows, max_length) for value in prompts.values]
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.prompt = torch.zeros(0, dtype=torch.int64)
        self._arrange()

    @staticmethod
    def _empty(like: Tensor, rows: int, max_length: int) -> Tensor:
        return like.new_zeros(rows, like.shape[1], max_length, like.shape[3])

    def admit(self, prompt: Tensor) -> None:
        """Add empty rows for requests of the given prompts, int64 [n]."""
        self.prompt = torch.cat([self.prompt, prompt])
        self.lengths = torch.cat([self.lengths, torch.zeros_like(prompt)])
        self._arrange()

    def retain(self, rows: Tensor) -> None:
        """Keep only the given rows, int64 [n] ascending."""
        if len(rows) == len(self.lengths):
            return
        filled = int(self.lengths.max()) if len(self.lengths) else 0
        for cache in (*self.keys, *self.values):
            cache[: len(rows), :, :filled] = cache[rows, :, :filled]
        self.lengths, self.prompt = self.lengths[rows], self.prompt[rows]
        self._arrange()

    def _arrange(self) -> None:
        """Which prompts are active, and where each row's query goes in the [prompt, place] grid."""
        active, group, counts = torch.unique(self.prompt, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        order = torch.argsort(group, stable=True)
        place = torch.empty_like(group)
        place[order] = torch.arange(len(group)) - starts[group[order]]
        self.width = int(counts.max()) if len(counts) else 0
        self.active = None if len(active) == len(self.prompts.lengths) else active
        self.grid_row = group * self.width + place
        self.grid = torch.zeros(len(active) * self.width, dtype=torch.int64)
        self.grid[self.grid_row] = torch.arange(len(group))
        lengths = self.prompts.lengths[self.prompt]
        columns = torch.arange(int(self.prompts.lengths.max()) if len(self.prompts.lengths) else 0)
        self.prompt_mask = columns[None, :] >= lengths[:, None]

    def step(self) -> None:
        """Call once before a decode step's layers: the new token of every row gets the next place."""
        self.rows = torch.arange(len(self.lengths))
        self.filled = int(self.lengths.max()) + 1
        self.own_mask = torch.arange(self.filled)[None, :] > self.lengths[:, None]
        self.mask = torch.cat([self.prompt_mask, self.own_mask], dim=1)[:, None, None, :]

    def advance(self) -> None:
        """Call once after a decode step's layers."""
        self.lengths = self.lengths + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One new token per row: q [N, Hq, D], k, v [N, Hk, D] of local layer ``layer`` (0-based) -> [N, Hq, D]."""
        count, heads, dim = query.shape
        kv_heads = key.shape[1]
        share = heads // kv_heads
        self.keys[layer][self.rows, :, self.lengths] = key
        self.values[layer][self.rows, :, self.lengths] = value
        own_keys = self.keys[layer][:count, :, : self.filled]
        own_values = self.values[layer][:count, :, : self.filled]
        prompt_keys, prompt_values = self.prompts.keys[layer], self.prompts.values[layer]
        if self.active is not None:
            prompt_keys, prompt_values = prompt_keys[self.active], prompt_values[self.active]
        groups, length = prompt_keys.shape[0], prompt_keys.shape[3]

        query = (query * dim**-0.5).view(count, kv_heads, share, dim)
        grid = query[self.grid].view(groups, self.width, kv_heads, share, dim).transpose(1, 2)
        prompt_scores = (grid.reshape(groups, kv_heads, self.width * share, dim) @ prompt_keys).view(
            groups, kv_heads, self.width, share, length
        )
        prompt_scores = prompt_scores.transpose(1, 2).reshape(-1, kv_heads, share, length)[self.grid_row]
        scores = torch.cat([prompt_scores, query @ own_keys.transpose(2, 3)], dim=-1)
        probs = scores.masked_fill_(self.mask, float("-inf")).softmax(-1)

        out = probs[..., length:] @ own_values
        grid = probs[..., :length][self.grid].view(groups, self.width, kv_heads, share, length).transpose(1, 2)
        from_prompt = (grid.reshape(groups, kv_heads, self.width * share, length) @ prompt_values).view(
            groups, kv_heads, self.width, share, dim
        )
        out = out + from_prompt.transpose(1, 2).reshape(-1, kv_heads, share, dim)[self.grid_row]
        return out.reshape(count, heads, dim)

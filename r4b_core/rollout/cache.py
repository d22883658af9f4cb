"""The key-value cache of the embedded engine: every prompt once, every response its own.

Shapes: G prompts, P longest prompt, N rows (responses being decoded), M most tokens of a response, Hk key/value heads
on this rank, s query heads per key/value head, D head dim. Heads come first, so that what one prompt's responses ask of
its keys is one matrix product without a copy of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from r4b_kernels import prefix_attention
from r4b_kernels.layout import PrefixLayout

_NEVER = float("-inf")


@dataclass
class PromptCache:
    """Keys and values of all prompts, per local layer.

    Attributes:
        keys: per layer [Hk, G, D, P] (transposed, as the product wants it).
        values: per layer [Hk, G, P, D].
        lengths: int64 [G].
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    lengths: Tensor = None  # type: ignore[assignment]

    def select(self, prompts: Tensor) -> PromptCache:
        """A copy of some prompts' entries, int64 ascending."""
        return PromptCache(
            [key.index_select(1, prompts) for key in self.keys],
            [value.index_select(1, prompts) for value in self.values],
            self.lengths[prompts],
        )


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
        self.cache.keys.append(key[self.index].permute(2, 0, 3, 1).contiguous())
        self.cache.values.append(value[self.index].permute(2, 0, 1, 3).contiguous())
        return prefix_attention(query, key, value, self.layout)


class ResponseCache:
    """Keys and values of the rows, and how the rows find their prompts'.

    All rows write a step's key into the same column, the step's number modulo M: no row lives for more than M steps,
    and attention does not care for the order of its keys. Rows are sorted by prompt. Where all prompts in work have
    equally many rows, the rows are the grid [prompt, place] as they lie; else queries and results go through an index.
    """

    def __init__(self, prompts: PromptCache, max_length: int) -> None:
        self.all_prompts = self.prompts = prompts
        self.keys = [self._empty(value, max_length) for value in prompts.values]
        self.values = [self._empty(value, max_length) for value in prompts.values]
        self.max_length = max_length
        self.time = 0
        self._prompt = self._start = torch.zeros(0, dtype=torch.int64)

    @staticmethod
    def _empty(like: Tensor, max_length: int) -> Tensor:
        return like.new_zeros(like.shape[0], 0, max_length, like.shape[3])

    def rearrange(self, kept: Tensor, admitted: Tensor, more_to_come: bool) -> Tensor:
        """Keep some rows and add empty ones.

        Args:
            kept: int64 [k], rows to keep.
            admitted: int64 [n], the prompts of new rows.
            more_to_come: whether prompts without rows may be asked for later; if not, they are forgotten.

        Returns:
            int64 [k + n], for every new row its place in ``cat(kept, admitted)``.
        """
        prompt = torch.cat([self._prompt[kept], admitted])
        # Where old rows decode their last token first, new ones idle for that step.
        start = torch.cat([self._start[kept], torch.full_like(admitted, self.time + (len(kept) > 0))])
        order = torch.argsort(prompt, stable=True)
        source = torch.cat([kept, torch.zeros_like(admitted)])[order]
        self._start = start[order]
        # A new row's columns hold whatever was there: they are masked until they are written.
        pick = _pick if len(self._prompt) else _zeros
        self.keys = [pick(key, source) for key in self.keys]
        self.values = [pick(value, source) for value in self.values]
        self._prompt = prompt[order]
        self._find_prompts(more_to_come)
        self._mask()
        # Views, made here once and not at every step: [Hk * N, M, D] and [Hk * G, D or P, P or D].
        self._own = [
            (key.flatten(0, 1), value.flatten(0, 1)) for key, value in zip(self.keys, self.values, strict=True)
        ]
        self._shared = [
            (key.flatten(0, 1), value.flatten(0, 1))
            for key, value in zip(self.prompts.keys, self.prompts.values, strict=True)
        ]
        return order

    def _find_prompts(self, more_to_come: bool) -> None:
        active, group, counts = torch.unique_consecutive(self._prompt, return_inverse=True, return_counts=True)
        self.prompts = self.all_prompts
        if len(active) < len(self.all_prompts.lengths):
            self.prompts = self.all_prompts.select(active)
        if not more_to_come:
            self.all_prompts, self._prompt = self.prompts, group
        self.width = int(counts.max())
        self.grid: Tensor | None = None
        if int(counts.min()) != self.width:
            place = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]
            self.grid_row = group * self.width + place
            self.grid = torch.zeros(len(active) * self.width, dtype=torch.int64)
            self.grid[self.grid_row] = torch.arange(len(group))
        self._lengths = self.prompts.lengths[group]

    def _mask(self) -> None:
        """[N, 1, P + M] to add to the scores, or None where every row sees all columns that there are."""
        self.mask: Tensor | None = None
        longest = self.prompts.values[0].shape[2]
        if not self._start.any() and bool((self._lengths == longest).all()):
            return
        # How many steps ago a column was written; rows see what is younger than they are.
        age = (self.time - 1 - torch.arange(self.max_length)) % self.max_length
        hidden = torch.cat(
            [
                torch.arange(longest) >= self._lengths[:, None],
                age >= (self.time - self._start)[:, None],
            ],
            dim=1,
        )
        self.mask = torch.zeros(hidden.shape, dtype=self.values[0].dtype).masked_fill_(hidden, _NEVER)[:, None]

    def step(self) -> None:
        """Call once before a decode step's layers: every row gets one more token."""
        self.column = self.time % self.max_length
        self.time += 1
        self.filled = min(self.time, self.max_length)
        if self.mask is not None:
            longest = self.prompts.values[0].shape[2]
            self.mask[:, 0, longest + self.column] = torch.where(self._start < self.time, 0.0, _NEVER)
            self.step_mask = self.mask[:, :, : longest + self.filled]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One new token per row, of local layer ``layer`` (0-based).

        Args:
            query: [Hk, N, s, D], scaled.
            key, value: [Hk, N, D].

        Returns:
            [Hk, N, s, D].
        """
        heads, rows, share, dim = query.shape
        self.keys[layer].select(2, self.column).copy_(key)
        self.values[layer].select(2, self.column).copy_(value)
        own_keys, own_values = (own.narrow(1, 0, self.filled) for own in self._own[layer])
        prompt_keys, prompt_values = self._shared[layer]
        batch, length = len(prompt_keys), prompt_keys.shape[2]
        query = query.contiguous().view(heads * rows, share, dim)

        asked = query if self.grid is None else self._to_grid(query, heads)
        prompt_scores = torch.bmm(asked.view(batch, self.width * share, dim), prompt_keys)
        prompt_scores = self._from_grid(prompt_scores, heads, share)
        scores = torch.cat([prompt_scores, torch.bmm(query, own_keys.transpose(1, 2))], dim=2)
        if self.mask is not None:
            scores.view(heads, rows, share, -1).add_(self.step_mask)
        probs = scores.softmax(2)

        asked = probs if self.grid is None else self._to_grid(probs, heads)
        asked = asked.view(batch, self.width * share, -1).narrow(2, 0, length)
        from_prompt = self._from_grid(torch.bmm(asked, prompt_values), heads, share)
        return torch.baddbmm(from_prompt, probs.narrow(2, length, self.filled), own_values).view(
            heads, rows, share, dim
        )

    def _to_grid(self, x: Tensor, heads: int) -> Tensor:
        """[Hk * N, s, .] of the rows -> [Hk, G * width, s, .] of the grid; empty places repeat row 0."""
        return x.view(heads, -1, *x.shape[1:]).index_select(1, self.grid)

    def _from_grid(self, x: Tensor, heads: int, share: int) -> Tensor:
        """[Hk * G, width * s, .] of the grid -> [Hk * N, s, .] of the rows."""
        if self.grid is None:
            return x.view(-1, share, x.shape[2])
        return x.view(heads, -1, share, x.shape[2]).index_select(1, self.grid_row).flatten(0, 1)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(1, rows)


def _zeros(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], len(rows), *x.shape[2:])

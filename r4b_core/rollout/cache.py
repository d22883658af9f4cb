"""The key-value cache of the embedded engine: every prompt once, every response its own.

Shapes: G prompts, P longest prompt, N rows (responses being decoded), M columns of a row, Hk key/value heads on this
rank, s query heads per key/value head, D head dim. P and M are rounded up to whole vectors of eight. Heads come first,
so that what one prompt's responses ask of its keys is one matrix product without a copy of the keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_core.models.layers import DecoderConfig
from r4b_kernels import dispatch, prefix_attention, qk_norm_mrope
from r4b_kernels.layout import PrefixLayout

_VECTOR = 8
# A row begins with this many columns, and gets as many more, or a quarter of what it has: budgets are far longer than
# most responses.
_COLUMNS = 128


@dataclass
class PromptCache:
    """Keys and values of some prompts, per local layer.

    Attributes:
        ids: the prompts' numbers, in the order of G.
        sizes: their tokens.
        starts: the position of the first response token of each.
        keys: per layer [Hk, G, D, P] (transposed, as the product wants it).
        values: per layer [Hk, G, P, D].
    """

    ids: list[int]
    sizes: list[int]
    starts: list[int]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def regroup(caches: Sequence[PromptCache], ids: Sequence[int]) -> PromptCache:
    """The prompts ``ids``, each of which is in one of the caches, as one cache in that order; no copy if it is one."""
    for cache in caches:
        if cache.ids == ids:
            return cache
    where = {prompt: (cache, place) for cache in caches for place, prompt in enumerate(cache.ids)}
    found = [where[prompt] for prompt in ids]
    made = PromptCache(
        list(ids), [cache.sizes[place] for cache, place in found], [cache.starts[place] for cache, place in found]
    )
    # For each cache: the places there, and the places here.
    parts: list[tuple[PromptCache, Tensor, Tensor]] = []
    for cache in caches:
        pairs = [(there, here) for here, (owner, there) in enumerate(found) if owner is cache]
        if pairs:
            there, here = torch.tensor(pairs, device=cache.values[0].device).unbind(1)
            parts.append((cache, there, here))
    columns = whole_vectors(max(made.sizes))
    for layer in range(len(parts[0][0].keys)):
        made.keys.append(_gather([(cache.keys[layer], *places) for cache, *places in parts], len(ids), columns, 3))
        made.values.append(_gather([(cache.values[layer], *places) for cache, *places in parts], len(ids), columns, 2))
    return made


def _gather(parts: Sequence[tuple[Tensor, Tensor, Tensor]], prompts: int, columns: int, dim: int) -> Tensor:
    """[Hk, prompts, ...] with ``columns`` along ``dim``: of each (source, there, here) what is there, put here."""
    if len(parts) == 1:
        ((source, there, _),) = parts
        return source.narrow(dim, 0, columns).index_select(1, there)
    shape = list(parts[0][0].shape)
    shape[1], shape[dim] = prompts, columns
    # Zeros: what no prompt fills is never seen, but must be finite.
    out = parts[0][0].new_zeros(shape)
    for source, there, here in parts:
        width = min(columns, source.shape[dim])
        out.narrow(dim, 0, width).index_copy_(1, here, source.narrow(dim, 0, width).index_select(1, there))
    return out


class Attention(Protocol):
    """What the tokens of a forward pass attend to: prompts to themselves, responses to their prompt and themselves."""

    def attend(self, layer: int, mixed: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """Norm, turn and attend in local layer ``layer`` (0-based).

        Args:
            mixed: [n, Hk, s + 2, D], the first projection: of each key/value head its s queries, its key, its value.
            q_norm, k_norm: [D], weights of the head norms.

        Returns:
            [n, Hk * s * D], what goes into the second projection.
        """
        ...


class PromptAttention:
    """Attends like training does, and keeps the keys and values of every prompt."""

    def __init__(self, cache: PromptCache, position_ids: Tensor, config: DecoderConfig) -> None:
        """``cache`` is to be filled; ``position_ids`` int64 [3, n] of all its prompts, one after the other."""
        self.cache, self.config, self.position_ids = cache, config, position_ids
        device = position_ids.device
        self.layout = PrefixLayout.from_lengths(cache.sizes, device=device)
        lengths, starts = self.layout.offsets.diff().long(), self.layout.offsets[:-1].long()
        # [G, P], each prompt's tokens in the stream; what is behind its end is never seen.
        columns = torch.arange(whole_vectors(max(cache.sizes)), device=device)
        self.index = torch.where(columns < lengths[:, None], starts[:, None] + columns, 0)

    def attend(self, layer: int, mixed: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        share = mixed.shape[2] - 2
        query, key = qk_norm_mrope(
            mixed[:, :, :share].flatten(1, 2),
            mixed[:, :, share],
            q_norm,
            k_norm,
            self.position_ids,
            theta=self.config.rope_theta,
            sections=self.config.mrope_sections,
            interleaved=self.config.mrope_interleaved,
            eps=self.config.layernorm_epsilon,
        )
        value = mixed[:, :, share + 1]
        self.cache.keys.append(key[self.index].permute(2, 0, 3, 1).contiguous())
        self.cache.values.append(value[self.index].permute(2, 0, 1, 3).contiguous())
        return prefix_attention(query, key, value, self.layout).flatten(1)


class ResponseCache:
    """Keys and values of the rows, and how the rows find their prompts'.

    Rows are sorted by prompt. A row's tokens stand in its own columns in their order; what lies after them is not seen.
    All rows have equally many columns, which grow with the longest of them.
    """

    def __init__(self, max_length: int, config: DecoderConfig) -> None:
        """``max_length`` is the most tokens that a response may have."""
        self.prompts = PromptCache([], [], [])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._ready: list[PromptCache] = []
        self._row_prompts: list[int] = []
        self._most = whole_vectors(max_length)
        self._columns = 0
        self._dim, self._theta, self._eps = config.kv_channels, config.rope_theta, config.layernorm_epsilon
        self._scale = self._dim**-0.5
        self._rope_table: Tensor | None = None

    def add(self, prompts: PromptCache) -> None:
        """Prompts whose requests may be admitted from now on."""
        self._ready.append(prompts)

    def rearrange(
        self, kept: Sequence[int], admitted: Sequence[int], waiting: Collection[int], longest: int
    ) -> list[int]:
        """Keep some rows and add empty ones.

        Args:
            kept: rows to keep.
            admitted: the prompts of new rows.
            waiting: prompts that rows may be asked for later; others without rows are forgotten.
            longest: the most tokens that a kept row has.

        Returns:
            For every new row its place in ``[*kept, *admitted]``.
        """
        prompt = [*(self._row_prompts[n] for n in kept), *admitted]
        order = sorted(range(len(prompt)), key=prompt.__getitem__)
        had_rows, self._row_prompts = bool(self._row_prompts), [prompt[n] for n in order]
        self._find_prompts(waiting)
        like = self.prompts.values[0]
        room = self.room(longest)
        if had_rows:
            # A new row's columns hold whatever was there: they are not seen until they are written.
            source = torch.tensor([kept[n] if n < len(kept) else 0 for n in order], device=like.device)
            room = min(room, self._columns)
            self.keys = [key[..., :room].index_select(1, source) for key in self.keys]
            self.values = [value[:, :, :room].index_select(1, source) for value in self.values]
        else:
            heads, rows = like.shape[0], len(order)
            self.keys = [like.new_zeros(heads, rows, self._dim, room) for _ in self.prompts.keys]
            self.values = [like.new_zeros(heads, rows, room, self._dim) for _ in self.prompts.keys]
        self._columns = room
        # The op's own implementation, chosen once for many steps: a step has no time for its checks.
        self._attention = dispatch.resolve("decode_attention", like.device, None, like, self.values[0]).forward
        return order

    def _find_prompts(self, waiting: Collection[int]) -> None:
        """The prompts of the rows side by side, and each row's among them."""
        active = list(dict.fromkeys(self._row_prompts))
        held = [self.prompts, *self._ready]
        self.prompts = regroup(held, active)
        later = set(waiting) - set(active)
        self._ready = [cache for cache in held if cache is not self.prompts and not later.isdisjoint(cache.ids)]
        device = self.prompts.values[0].device
        group = {prompt: place for place, prompt in enumerate(active)}
        counts = [0] * (len(active) + 1)
        for prompt in self._row_prompts:
            counts[group[prompt] + 1] += 1
        self._offsets = torch.tensor(counts, device=device).cumsum(0)
        self._lengths = torch.tensor(self.prompts.sizes, device=device)
        starts = self.prompts.starts
        self._start = torch.tensor([starts[group[prompt]] for prompt in self._row_prompts], device=device)
        self._last_start = max(starts)

    def room(self, columns: int) -> int:
        """The columns that every row has where one needs so many; no more than a response may have."""
        room = _COLUMNS
        while room < columns:
            room = whole_vectors(room + max(_COLUMNS, room // 4))
        return min(room, self._most)

    def step(self, position: Tensor, longest: int) -> None:
        """Call once before a decode step's layers: every row gets its token at a position int64 [N].

        A position before a row's first makes it idle; one past the last column of a response overwrites that one.
        ``longest`` is the most tokens that a row will have.
        """
        if (room := self.room(longest)) > self._columns:
            more = room - self._columns
            for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
                self.keys[layer], self.values[layer] = F.pad(key, (0, more)), F.pad(value, (0, 0, 0, more))
            self._columns = room
        self._column = position - self._start
        self._rope = self._turns(self._last_start + longest).index_select(1, position)

    def _turns(self, positions: int) -> Tensor:
        """[2, at least so many positions, D], see `_rope_table`; made anew twice as long where it is too short."""
        if self._rope_table is None or self._rope_table.shape[1] < positions:
            like = self.values[0]
            length = self._last_start + 2 * max(self._columns, positions - self._last_start)
            self._rope_table = _rope_table(self._dim, self._theta, length, like.dtype, like.device)
        return self._rope_table

    def attend(self, layer: int, mixed: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """See `Attention`; one token per row, by `r4b_kernels.decode_attention`."""
        return self._attention(
            mixed,
            q_norm,
            k_norm,
            self._rope,
            self._column,
            self.prompts.keys[layer],
            self.prompts.values[layer],
            self._lengths,
            self._offsets,
            self.keys[layer],
            self.values[layer],
            self._eps,
            self._scale,
        )


def whole_vectors(columns: int) -> int:
    """Columns of a cache that holds so many tokens."""
    return columns + -columns % _VECTOR


def _rope_table(dim: int, theta: float, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2, positions, D], factors of x and of x rolled by D/2; a response token has one position on all axes."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).to(dtype)

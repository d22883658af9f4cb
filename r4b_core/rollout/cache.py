"""The key-value cache of the embedded engine: every prompt once, every response its own.

Shapes: G prompts, P longest prompt, N rows (responses being decoded), M most tokens of a response, Hk key/value heads
on this rank, s query heads per key/value head, D head dim. P and M are rounded up to whole vectors of eight. Heads come
first, so that what one prompt's responses ask of its keys is one matrix product without a copy of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_core.models.layers import DecoderConfig
from r4b_kernels import dispatch, prefix_attention, qk_norm_mrope
from r4b_kernels.layout import PrefixLayout

_VECTOR = 8


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

    def __init__(self, lengths: list[int], config: DecoderConfig) -> None:
        self.config = config
        self.cache = PromptCache(lengths=torch.tensor(lengths))
        self.layout = PrefixLayout.from_lengths(lengths)
        starts = self.layout.offsets[:-1].long()
        self.position = torch.arange(sum(lengths)) - starts.repeat_interleave(self.cache.lengths)
        # [G, P], each prompt's tokens in the stream; what is behind its end is never seen.
        columns = torch.arange(whole_vectors(max(lengths)))
        self.index = torch.where(columns < self.cache.lengths[:, None], starts[:, None] + columns, 0)

    def attend(self, layer: int, mixed: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        share = mixed.shape[2] - 2
        query, key = qk_norm_mrope(
            mixed[:, :, :share].flatten(1, 2),
            mixed[:, :, share],
            q_norm,
            k_norm,
            self.position.expand(3, -1),
            theta=self.config.rope_theta,
            eps=self.config.layernorm_epsilon,
        )
        value = mixed[:, :, share + 1]
        self.cache.keys.append(key[self.index].permute(2, 0, 3, 1).contiguous())
        self.cache.values.append(value[self.index].permute(2, 0, 1, 3).contiguous())
        return prefix_attention(query, key, value, self.layout).flatten(1)


class ResponseCache:
    """Keys and values of the rows, and how the rows find their prompts'.

    Rows are sorted by prompt. A row's tokens stand in its own columns in their order; what lies after them is not seen.
    """

    def __init__(self, prompts: PromptCache, max_length: int, config: DecoderConfig) -> None:
        self.all_prompts = self.prompts = prompts
        columns = whole_vectors(max_length)
        self.keys = [key.new_zeros(key.shape[0], 0, key.shape[2], columns) for key in prompts.keys]
        self.values = [value.new_zeros(value.shape[0], 0, columns, value.shape[3]) for value in prompts.values]
        self._prompt = torch.zeros(0, dtype=torch.int64)
        # The op's own implementation, chosen once: a step has no time for its checks.
        sample = prompts.values[0], self.values[0]
        self._attention = dispatch.resolve("decode_attention", sample[0].device, None, *sample).forward
        dim, self._eps = config.kv_channels, config.layernorm_epsilon
        self._scale = dim**-0.5
        # An ended row may be decoded on, until its neighbours have ended: at most for another response.
        self._rope_table = _rope_table(
            dim, config.rope_theta, int(prompts.lengths.max()) + 2 * max_length, sample[0].dtype
        )

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
        order = torch.argsort(prompt, stable=True)
        source = torch.cat([kept, torch.zeros_like(admitted)])[order]
        # A new row's columns hold whatever was there: they are not seen until they are written.
        pick = _pick if len(self._prompt) else _zeros
        self.keys = [pick(key, source) for key in self.keys]
        self.values = [pick(value, source) for value in self.values]
        self._prompt = prompt[order]
        self._find_prompts(more_to_come)
        return order

    def _find_prompts(self, more_to_come: bool) -> None:
        active, group, counts = torch.unique_consecutive(self._prompt, return_inverse=True, return_counts=True)
        self.prompts = self.all_prompts
        if len(active) < len(self.all_prompts.lengths):
            self.prompts = self.all_prompts.select(active)
        if not more_to_come:
            self.all_prompts, self._prompt = self.prompts, group
        self.offsets = F.pad(counts.cumsum(0), (1, 0))
        self._lengths = self.prompts.lengths[group]

    def step(self, position: Tensor) -> None:
        """Call once before a decode step's layers: every row gets its token at a position int64 [N].

        A position before a row's first makes it idle; one past its last column overwrites that one.
        """
        self._column = position - self._lengths
        self._rope = self._rope_table.index_select(1, position)

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
            self.prompts.lengths,
            self.offsets,
            self.keys[layer],
            self.values[layer],
            self._eps,
            self._scale,
        )


def whole_vectors(columns: int) -> int:
    """Columns of a cache that holds so many tokens."""
    return columns + -columns % _VECTOR


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(1, rows)


def _zeros(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], len(rows), *x.shape[2:])


def _rope_table(dim: int, theta: float, positions: int, dtype: torch.dtype) -> Tensor:
    """[2, positions, D], factors of x and of x rolled by D/2; a response token has one position on all axes."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).to(dtype)

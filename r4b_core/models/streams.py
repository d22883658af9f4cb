"""What an attention layer attends to, told from outside: Megatron passes the object through unseen.

A stream travels as ``packed_seq_params``: a PackedStream through decoders, a VisionStream through vision towers.

Shapes: T tokens of the whole stream, t = T / cp tokens of this context-parallel rank, Hq/Hk heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from r4b_kernels import prefix_attention, vision_attention
from r4b_kernels.layout import PrefixLayout


class Stream(Protocol):
    """The attention side of a forward pass."""

    position_ids: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [t, Hq, D] of a layer (1-based, global number) for q [t, Hq, D] and k, v [t, Hk, D]."""
        ...


@dataclass
class PackedStream(PackedSeqParams):
    """Packed, possibly prefix-shared sequences.

    Under context parallelism every rank holds a contiguous chunk of the stream outside attention; inside, an all-to-all
    trades tokens for heads, so that `prefix_attention` always sees whole segments.

    Attributes:
        layout: of the whole stream.
        position_ids: [3, t], of this rank's chunk.
        context_group: the context-parallel group, or None.
    """

    layout: PrefixLayout = None  # type: ignore[assignment]
    position_ids: Tensor = None  # type: ignore[assignment]
    context_group: ProcessGroup | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.context_group is None or self.context_group.size() == 1:
            return prefix_attention(query, key, value, self.layout)
        query, key, value = (tokens_to_heads(x, self.context_group) for x in (query, key, value))
        return heads_to_tokens(prefix_attention(query, key, value, self.layout), self.context_group)


@dataclass
class VisionStream(PackedSeqParams):
    """Images of a batch, one bidirectional segment each (``cu_seqlens`` int32 [I+1])."""

    cu_seqlens: Tensor = None  # type: ignore[assignment]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return vision_attention(query, key, value, self.cu_seqlens)


def tokens_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[t, H, D] of my tokens and all heads -> [T, H / cp, D] of all tokens and my heads."""
    size = group.size()
    tokens, heads, dim = x.shape
    by_owner = x.view(tokens, size, heads // size, dim).transpose(0, 1).reshape(size * tokens, heads // size, dim)
    return tensor_parallel.all_to_all(group, by_owner)


def heads_to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    size = group.size()
    tokens, heads, dim = x.shape[0] // size, x.shape[1], x.shape[2]
    by_source = tensor_parallel.all_to_all(group, x.contiguous()).view(size, tokens, heads, dim)
    return by_source.transpose(0, 1).reshape(tokens, size * heads, dim)


def context_chunk(num_tokens: int, group: ProcessGroup | None) -> tuple[int, int]:
    """[start, stop) of this context-parallel rank's tokens in a stream of ``num_tokens``."""
    if group is None or group.size() == 1:
        return 0, num_tokens
    size = num_tokens // group.size()
    return group.rank() * size, (group.rank() + 1) * size


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad the first dimension with zeros to a multiple (sequence parallelism splits it evenly)."""
    short = -x.shape[0] % multiple
    return x if short == 0 else torch.cat([x, x.new_zeros(short, *x.shape[1:])])

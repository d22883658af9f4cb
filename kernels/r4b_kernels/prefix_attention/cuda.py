"""CUDA C++ backend of prefix_attention for Hopper: TMA, wgmma, one online softmax over parent and own keys.

Compiled and emulated, never run on a GPU so far: it serves only who asks for it by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 128  # csrc/cuda/prefix_tiles.h


class Backend:
    """Forward in CUDA C++ (csrc/cuda/prefix_attention.cu); the backward is that of the triton backend."""

    @staticmethod
    def refuses(q: Tensor) -> str | None:
        """Why the kernel cannot serve q, or None."""
        if q.dtype != torch.bfloat16:
            return f"computes in bfloat16, q is {q.dtype}"
        if q.shape[-1] not in (64, 128):
            return f"is written for head_dim D=64 and 128, q has D={q.shape[-1]}"
        return None

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [T, Hq, D], lse float32 [T, Hq]).

        Raises:
            ValueError: if ``scale`` is not positive: the kernel takes the maximum of the scores before it scales them.
        """
        if not scale > 0:
            raise ValueError(f"scale={scale}: the cuda backend needs a positive one; backend='triton' takes any")
        q, k, v = (_addressable(x) for x in (q, k, v))
        offsets = offsets.contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        tiles = schedule(offsets, parent, q.shape[0])
        torch.ops.r4b_native.prefix_attention(q, k, v, offsets, tiles, scale, out, lse)
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Tensor,
        parent: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from r4b_kernels.prefix_attention.triton import Backend as Triton  # here: the forward does without triton

        return Triton.backward(grad_out, q, k, v, out, lse, offsets, parent, scale)


def schedule(offsets: Tensor, parent: Tensor, num_tokens: int, rows: int = TILE_ROWS) -> Tensor:
    """The tiles of at most ``rows`` query rows, int32 [N, 8] as _varlen_schedule.Schedule.queries lists them, in one
    launch; in order of falling cost to within 1/64 of the highest."""
    segments = parent.numel()
    slots = num_tokens // rows + segments + 2
    tiles = offsets.new_empty(slots, 8)
    scratch = offsets.new_empty(2 * (segments + 1) + 9 * slots)
    torch.ops.r4b_native.prefix_schedule(offsets.contiguous(), parent.contiguous(), num_tokens, rows, tiles, scratch)
    return tiles


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy where TMA cannot walk it: the first element and all rows must lie at multiples of 16 bytes."""
    steps = (stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True) if size > 1)
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)

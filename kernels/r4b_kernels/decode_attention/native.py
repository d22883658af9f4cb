"""C++ backend of decode_attention, in float32 (csrc/cpu/decode_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8


class Backend:
    """The native backend."""

    @staticmethod
    def refuses(prompt_values: Tensor, own_values: Tensor) -> str | None:
        if own_values.dtype != torch.float32:
            return f"is compiled for float32, got {own_values.dtype}"
        sizes = dict(D=own_values.shape[3], P=prompt_values.shape[2], M=own_values.shape[2])
        return next(
            (f"reads {LANES} keys at once: {k}={v} is no multiple of it" for k, v in sizes.items() if v % LANES), None
        )

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
        """All tensors contiguous."""
        rows, heads, each, dim = mixed.shape
        out = mixed.new_empty(rows, heads * (each - 2) * dim)
        torch.ops.r4b_native.decode_attention.default(
            mixed,
            q_weight,
            k_weight,
            rope,
            column,
            prompt_keys,
            prompt_values,
            prompt_lengths,
            offsets,
            own_keys,
            own_values,
            eps,
            scale,
            out,
        )
        return out

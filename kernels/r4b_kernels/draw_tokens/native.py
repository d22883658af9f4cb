"""C++ backend of draw_tokens, in float32 (csrc/cpu/draw_tokens.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor


class Backend:
    """The native backend."""

    @staticmethod
    def refuses(logits: Tensor) -> str | None:
        return None if logits.dtype == torch.float32 else f"is compiled for float32, got {logits.dtype}"

    @staticmethod
    def forward(
        logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors contiguous."""
        logprob = logits.new_empty(logits.shape[0])
        entropy, token = torch.empty_like(logprob), torch.empty_like(logprob, dtype=torch.int64)
        torch.ops.r4b_native.draw_tokens.default(logits, point, forced, temperature, top_p, token, logprob, entropy)
        return token, logprob, entropy

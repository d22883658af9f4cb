"""What the Triton backends share. Imports triton: only they may import it."""

from __future__ import annotations

import torch
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype a kernel computes in, its constexpr ACC: float64 for float64 inputs (the interpreter), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32

"""Triton backend of vision_attention: the kernels of prefix_attention without a causal mask and without parents."""

from __future__ import annotations

from torch import Tensor

from r4b_kernels import _varlen_triton as varlen


class Backend:
    """The triton backend. The schedule of tiles is kept with ``cu_seqlens`` (_varlen_schedule.schedule_for)."""

    refuses = staticmethod(varlen.refuses)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return varlen.forward(q, k, v, cu_seqlens, None, scale, causal=False)

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return varlen.backward(grad_out, q, k, v, out, lse, cu_seqlens, None, scale, causal=False)

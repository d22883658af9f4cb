"""Triton backend of prefix_attention: own segment and parent in one online softmax, prefix gradients in registers."""

from __future__ import annotations

from torch import Tensor

from r4b_kernels import _varlen_triton as varlen


class Backend:
    """The triton backend. The schedule of tiles is kept with the layout's tensors (_varlen_schedule.schedule_for)."""

    refuses = staticmethod(varlen.refuses)

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return varlen.forward(q, k, v, offsets, parent, scale, causal=True)

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
        return varlen.backward(grad_out, q, k, v, out, lse, offsets, parent, scale, causal=True)

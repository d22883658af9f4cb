"""Bidirectional attention within each image of a packed stream of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vision_attention import cpu as _cpu
from r4b_kernels.vision_attention import reference as _reference

dispatch.register("vision_attention", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register(
    "vision_attention", "triton", "r4b_kernels.vision_attention.triton:Backend", dispatch.where_triton_runs
)
dispatch.register("vision_attention", "reference", _reference.Backend)


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """softmax(scale * q k^T) v within every segment ``[cu_seqlens[i], cu_seqlens[i+1])``, without a causal mask.

    Patches from ``cu_seqlens[-1]`` to P belong to no image: their output and every gradient through them is 0.

    Args:
        q, k, v: [P, H, D], one floating-point dtype and device. Any D; 64, 72, 80 and 128 are what ViTs use.
        cu_seqlens: int32 [n+1], non-decreasing, ``cu_seqlens[0] == 0``, on the device of q.
        scale: factor on the scores, ``D ** -0.5`` by default.
        backend: a backend by name; by default the best one for the device.

    Returns:
        [P, H, D] in q.dtype.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or (on the CPU) a malformed or too long cu_seqlens.
        BackendError: if ``backend`` does not exist or cannot serve the device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape != q.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, q {list(q.shape)}: expected [patches, heads, head_dim]"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: they must agree"
            )
    if not q.is_floating_point():
        raise ValueError(f"q has dtype {q.dtype}: expected a floating-point dtype")
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q has shape {list(q.shape)}: heads and D must be at least 1")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [images + 1]")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: they must agree")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _forward(q, k, v, cu_seqlens, scale, backend)[0]


@torch.library.custom_op("r4b_kernels::vision_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return dispatch.resolve("vision_attention", q.device, backend, q).forward(q, k, v, cu_seqlens, scale)


@torch.library.custom_op("r4b_kernels::vision_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("vision_attention", q.device, backend, q)
    return implementation.backward(grad_out, q, k, v, out, lse, cu_seqlens, scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    q, k, v, cu_seqlens, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
    ctx.scale, ctx.backend = scale, backend


def _autograd(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _backward(grad_out, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.backend)
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

__all__ = ["vision_attention"]

"""Causal attention over a packed stream whose segments may share a parent segment (prompt)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.layout import PrefixLayout
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.prefix_attention import cpu as _cpu
from r4b_kernels.prefix_attention import reference as _reference

# Order is preference: the reference serves only where nothing better does.
dispatch.register("prefix_attention", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register(
    "prefix_attention", "triton", "r4b_kernels.prefix_attention.triton:Backend", dispatch.where_triton_runs
)
dispatch.register("prefix_attention", "reference", _reference.Backend)
# Last, so that it serves only who asks for it by name: it has never run on a GPU.
dispatch.register("prefix_attention", "cuda", "r4b_kernels.prefix_attention.cuda:Backend", native.cuda_available)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, where a token sees its own segment causally and its parent segment in full.

    Grouped-query attention: query head h reads key/value head ``h // (Hq // Hk)``. Tokens from ``layout.offsets[-1]``
    to T belong to no segment: their output and every gradient through them is 0, their log-sum-exp is -inf. Results
    and gradients are bit-repeatable. The mask is that of ``PrefixLayout.dense_mask``; the split into an own and a
    shared part, merged by log-sum-exp, follows cascade inference (FlashInfer) and arXiv 2506.05433.

    Args:
        q: [T, Hq, D], float32, float64, bfloat16 or float16.
        k: [T, Hk, D], the dtype and device of q; Hk divides Hq.
        v: [T, Hk, D], the dtype and device of q.
        layout: segments of the T tokens, on the device of q; may cover fewer tokens than T. Lengths of 0 are allowed.
        scale: factor on the scores, ``D ** -0.5`` by default.
        return_lse: return the natural-log sum of exponentiated scores too. It carries no gradient.
        backend: a backend by name; by default the best one for the device.

    Returns:
        out [T, Hq, D] in q.dtype, or (out, lse) with lse [T, Hq] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or (on the CPU) a layout that is malformed or longer
            than T.
        BackendError: if ``backend`` does not exist or cannot serve the device.
    """
    _check(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _forward(q, k, v, layout.offsets, layout.parent, scale, backend)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: expected three dimensions [tokens, heads, head_dim]"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: they must agree"
            )
    if not q.is_floating_point():
        raise ValueError(f"q has dtype {q.dtype}: expected a floating-point dtype")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)}, v {list(v.shape)}: they must be equal")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has {k.shape[0]} tokens, q {q.shape[0]}: they must be equal")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head_dim D={k.shape[2]}, q D={q.shape[2]}: they must be equal")
    if q.shape[2] < 1 or k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, k {k.shape[1]}, D={q.shape[2]}: the heads of q must be a multiple of those of k"
        )
    for name, tensor, size in (
        ("layout.offsets", layout.offsets, layout.parent.numel() + 1),
        ("layout.parent", layout.parent, layout.parent.numel()),
    ):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.numel() != size:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: expected int32 [{size}] "
                "(offsets has one entry more than parent)"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move it with layout.to(q.device)")


@torch.library.custom_op("r4b_kernels::prefix_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return dispatch.resolve("prefix_attention", q.device, backend, q).forward(q, k, v, offsets, parent, scale)


@torch.library.custom_op("r4b_kernels::prefix_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    parent: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("prefix_attention", q.device, backend, q)
    return implementation.backward(grad_out, q, k, v, out, lse, offsets, parent, scale)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    parent: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    q, k, v, offsets, parent, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, offsets, parent)
    ctx.scale, ctx.backend = scale, backend


def _autograd(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, offsets, parent = ctx.saved_tensors
    grads = _backward(grad_out, q, k, v, out, lse, offsets, parent, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

__all__ = ["prefix_attention"]

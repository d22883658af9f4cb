"""Per-head RMSNorm of q and k, then rotary position embedding with one or three position axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.qk_norm_mrope import cpu as _cpu
from r4b_kernels.qk_norm_mrope import reference as _reference

# Order is preference: the reference serves only where nothing better does.
dispatch.register("qk_norm_mrope", "native", "r4b_kernels.qk_norm_mrope.native:Backend", native.cpu_available)
dispatch.register("qk_norm_mrope", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("qk_norm_mrope", "triton", "r4b_kernels.qk_norm_mrope.triton:Backend", dispatch.where_triton_runs)
dispatch.register("qk_norm_mrope", "reference", _reference.Backend)


def qk_norm_mrope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    *,
    theta: float,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """rotate(weight * x / sqrt(mean(x^2) + eps)) for every head of q and of k.

    The pair (i, i + D/2) turns by ``position * theta ** (-2i / D)``; which of a token's three positions pair i uses is
    set by ``sections`` and ``interleaved``. The norm follows Qwen3: normalised in float32, rounded to the input
    dtype, multiplied by the weight. The rotation is in float32 and rounded once. (float64 inputs: all in float64.)

    Args:
        q: [T, Hq, D], D even.
        k: [T, Hk, D], the dtype and device of q.
        q_weight: [D], floating point.
        k_weight: [D], floating point.
        position_ids: [3, T] int64 or int32: time, height, width.
        theta: base of the frequencies.
        sections: None uses time for every pair; [t, h, w] with sum D/2 shares the pairs out among the axes.
        interleaved: with sections, False gives the first t pairs to time, the next h to height, the rest to width
            (Qwen2-VL); True gives pairs 1, 4, 7, ... < 3h to height, 2, 5, 8, ... < 3w to width, the rest to time
            (Qwen3-VL).
        eps: added to the mean square.
        backend: a backend by name; by default the best one for the device.

    Returns:
        (q, k) with the shapes and dtypes of the inputs. Gradients reach q, k and both weights.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or sections that do not share out D/2 pairs.
        BackendError: if ``backend`` does not exist or cannot serve the device.
    """
    _check(q, k, q_weight, k_weight, position_ids)
    axes = pair_axes(q.shape[-1], sections, interleaved)
    return _forward(q, k, q_weight, k_weight, position_ids, float(theta), axes, float(eps), backend)


def pair_axes(head_dim: int, sections: Sequence[int] | None, interleaved: bool) -> list[int]:
    """The position axis (0 time, 1 height, 2 width) of each of the D/2 pairs; [] if all use time."""
    if sections is None:
        return []
    half = head_dim // 2
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != half:
        raise ValueError(f"sections={list(sections)}: expected three counts >= 0 whose sum is D/2 = {half}")
    _, height, width = sections
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * half
    axes[1 : 3 * height : 3] = [1] * len(axes[1 : 3 * height : 3])
    axes[2 : 3 * width : 3] = [2] * len(axes[2 : 3 * width : 3])
    return axes


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, position_ids: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [tokens, heads, head_dim]")
    if not q.is_floating_point() or k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}: they must be the same floating-point dtype")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k has shape {list(k.shape)}, q {list(q.shape)}: tokens and head_dim must be equal")
    if q.shape[2] < 2 or q.shape[2] % 2:
        raise ValueError(f"q has head_dim D={q.shape[2]}: rotary pairs need an even D")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[2:] or not weight.is_floating_point():
            raise ValueError(f"{name} is {weight.dtype} {list(weight.shape)}: expected floating point [{q.shape[2]}]")
    if tuple(position_ids.shape) != (3, q.shape[0]) or position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"position_ids is {position_ids.dtype} {list(position_ids.shape)}: "
            f"expected int64 or int32 [3, {q.shape[0]}]"
        )
    dispatch.check_devices("q", q.device, k=k, q_weight=q_weight, k_weight=k_weight, position_ids=position_ids)


@torch.library.custom_op("r4b_kernels::qk_norm_mrope", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    theta: float,
    axes: Sequence[int],
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    implementation = dispatch.resolve("qk_norm_mrope", q.device, backend, q)
    return implementation.forward(q, k, q_weight, k_weight, position_ids, theta, axes, eps)


@torch.library.custom_op("r4b_kernels::qk_norm_mrope_backward", mutates_args=())
def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    theta: float,
    axes: Sequence[int],
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("qk_norm_mrope", q.device, backend, q)
    return implementation.backward(grad_q, grad_k, q, k, q_weight, k_weight, position_ids, theta, axes, eps)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    theta: float,
    axes: Sequence[int],
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_backward.register_fake
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    theta: float,
    axes: Sequence[int],
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    q, k, q_weight, k_weight, position_ids, theta, axes, eps, backend = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, position_ids)
    ctx.theta, ctx.axes, ctx.eps, ctx.backend = theta, axes, eps, backend


def _autograd(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad_q, grad_k, *ctx.saved_tensors, ctx.theta, ctx.axes, ctx.eps, ctx.backend)
    return *grads, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

__all__ = ["pair_axes", "qk_norm_mrope"]

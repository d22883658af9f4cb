"""Root-mean-square normalisation, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.rms_norm import cpu, reference

__all__ = ["rms_norm"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("rms_norm", "native", "r4b_kernels.rms_norm.native:Backend", native.cpu_available)
dispatch.register("rms_norm", "cpu", cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("rms_norm", "triton", "r4b_kernels.rms_norm.triton:Backend", dispatch.where_triton_runs)
dispatch.register("rms_norm", "reference", reference.Backend)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The mean and the division are done in float32 (float64 for float64), the quotient is rounded to x's dtype and then
    multiplied by the weight: the order of Qwen3's RMSNorm, so that bfloat16 results agree with it.

    Args:
        x: [..., H], floating point.
        weight: [H], of any floating dtype; the result has the promoted dtype of x and weight.
        eps: added to the mean square.
        backend: "native", "cpu", "triton" or "reference"; None picks by device.

    Raises:
        ValueError: if weight is not [H], dtypes or devices do not fit, or the backend cannot serve the input.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [H], the last dimension of x {tuple(x.shape)}, it is {tuple(weight.shape)}")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: both must be floating-point")
    dispatch.check_devices("x", x.device, weight=weight)
    return _rms_norm(x, weight, float(eps), backend)[0]


@torch.library.custom_op("r4b_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return dispatch.resolve("rms_norm", x.device, backend, x).forward(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("r4b_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return dispatch.resolve("rms_norm", x.device, backend, x).backward(grad, x, weight, rstd)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    grad_x, grad_weight = _rms_norm_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_weight, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)

"""The gated activation of the feed-forward block: silu(gate) * up on the two halves of one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.swiglu import cpu, reference

__all__ = ["swiglu"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("swiglu", "cpu", cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("swiglu", "triton", "r4b_kernels.swiglu.triton:Backend", dispatch.where_triton_runs)
dispatch.register("swiglu", "reference", reference.Backend)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, with [gate | up] the halves of the last dimension.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        gate_up: [..., 2F], floating point.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Returns:
        [..., F] of gate_up's dtype.

    Raises:
        ValueError: if the last dimension is odd, the dtype is none of floats, or the backend cannot serve the device.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], it is {tuple(gate_up.shape)}")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up must be floating-point, it is {gate_up.dtype}")
    return _swiglu(gate_up, backend)


@torch.library.custom_op("r4b_kernels::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, backend: str | None) -> Tensor:
    return dispatch.resolve("swiglu", gate_up.device, backend, gate_up).forward(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor, backend: str | None) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("r4b_kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate_up: Tensor, backend: str | None) -> Tensor:
    return dispatch.resolve("swiglu", gate_up.device, backend, gate_up).backward(grad, gate_up)


@_swiglu_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, backend: str | None) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _swiglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


_swiglu.register_autograd(_backward, setup_context=_setup_context)

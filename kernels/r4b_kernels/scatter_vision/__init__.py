"""Put (or add) vision features into the rows of a token stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.scatter_vision import cpu as _cpu
from r4b_kernels.scatter_vision import reference as _reference

dispatch.register("scatter_vision", "native", "r4b_kernels.scatter_vision.native:Backend", native.cpu_available)
dispatch.register("scatter_vision", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("scatter_vision", "triton", "r4b_kernels.scatter_vision.triton:Backend", dispatch.where_triton_runs)
dispatch.register("scatter_vision", "reference", _reference.Backend)


def scatter_vision(
    embeddings: Tensor, features: Tensor, index: Tensor, *, accumulate: bool = False, backend: str | None = None
) -> Tensor:
    """Row t is ``features[index[t]]`` (plus ``embeddings[t]`` if accumulate) or, for an index of -1, ``embeddings[t]``.

    Replacing is how image tokens get their embedding; adding is how DeepStack (Qwen3-VL) feeds early layers. A feature
    row may be used by several tokens, its gradient is then their sum (in float32, in an order that the
    index alone decides), or by none. On a GPU nothing waits for the index: one outside -1 .. P-1 makes its row NaN.

    Args:
        embeddings: [T, H], floating point.
        features: [P, H], the dtype and device of embeddings.
        index: [T] int64 or int32, -1 or a row of features.
        accumulate: add instead of replace.
        backend: a backend by name; by default the best one for the device.

    Returns:
        [T, H] in the dtype of embeddings; always new memory.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or (on the CPU) an index outside -1 .. P-1.
        BackendError: if ``backend`` does not exist or cannot serve the device.
    """
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings is {embeddings.dtype} {list(embeddings.shape)}: expected floating point [T, H]")
    if features.dim() != 2 or features.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"features has shape {list(features.shape)}: expected [P, {embeddings.shape[1]}] as embeddings"
        )
    if features.dtype != embeddings.dtype:
        raise ValueError(f"features is {features.dtype}, embeddings {embeddings.dtype}: they must agree")
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape) != (embeddings.shape[0],):
        raise ValueError(
            f"index is {index.dtype} {list(index.shape)}: "
            f"expected int64 or int32 [{embeddings.shape[0]}], one per token"
        )
    dispatch.check_devices("embeddings", embeddings.device, features=features, index=index)
    return _forward(embeddings, features, index, accumulate, backend)


@torch.library.custom_op("r4b_kernels::scatter_vision", mutates_args=())
def _forward(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool, backend: str | None) -> Tensor:
    implementation = dispatch.resolve("scatter_vision", embeddings.device, backend, embeddings)
    return implementation.forward(embeddings, features, index, accumulate)


@torch.library.custom_op("r4b_kernels::scatter_vision_backward", mutates_args=())
def _backward(
    grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(gradient of embeddings, empty if accumulate, when it is grad_out itself; gradient of features)."""
    implementation = dispatch.resolve("scatter_vision", grad_out.device, backend, grad_out)
    return implementation.backward(grad_out, index, num_features, accumulate)


@_forward.register_fake
def _(embeddings: Tensor, features: Tensor, index: Tensor, accumulate: bool, backend: str | None) -> Tensor:
    return embeddings.new_empty(embeddings.shape)


@_backward.register_fake
def _(
    grad_out: Tensor, index: Tensor, num_features: int, accumulate: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    grad_embeddings = grad_out.new_empty(0 if accumulate else grad_out.shape)
    return grad_embeddings, grad_out.new_empty((num_features, grad_out.shape[1]))


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    _, features, index, accumulate, backend = inputs
    ctx.save_for_backward(index)
    ctx.num_features, ctx.accumulate, ctx.backend = features.shape[0], accumulate, backend


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    grad_embeddings, grad_features = _backward(grad_out, index, ctx.num_features, ctx.accumulate, ctx.backend)
    if ctx.accumulate:
        grad_embeddings = grad_out
    return grad_embeddings, grad_features, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

__all__ = ["scatter_vision"]

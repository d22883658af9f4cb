"""LayerNorm of patches and the merge of neighbours into one row, before a patch merger's MLP: one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r4b_kernels import dispatch
from r4b_kernels.merge_norm import cpu, reference
from r4b_kernels.precision import accumulation_dtype

__all__ = ["merge_norm"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("merge_norm", "cpu", cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("merge_norm", "triton", "r4b_kernels.merge_norm.triton:Backend", dispatch.where_triton_runs)
dispatch.register("merge_norm", "reference", reference.Backend)


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    merge: int = 4,
    norm_merged: bool = False,
    order: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm, and every ``merge`` consecutive patches side by side in one row.

    Qwen3-VL's merger normalises each patch, its DeepStack mergers (``use_postshuffle_norm``) the merged row; R-4B's
    projector is ``merge=1``. Computed in float32 (float64 for float64) and rounded once, to x's dtype.

    Args:
        x: [P, C], floating point; P a multiple of merge.
        weight: [C], or [merge * C] if norm_merged; of any floating dtype.
        bias: like weight.
        merge: patches in a row of the result.
        norm_merged: normalise rows after the merge instead of patches before it.
        order: int64 [P], a permutation: place p of the result takes patch order[p], so that a ViT whose patches lie in
            raster order merges its blocks in the same pass. None takes them as they lie.
        eps: added to the variance.
        backend: "cpu", "triton" or "reference"; None picks by device.

    Returns:
        [P / merge, merge * C] of x's dtype.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit; or (not on a GPU, which nobody waits for) an order
            that is no permutation. On a GPU the places whose entry is not in 0 .. P-1 become NaN, and so do the
            gradients of patches that have no place.
        BackendError: if ``backend`` does not exist or cannot serve the input.
    """
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [P, C] with C >= 1, it is {x.dtype} {tuple(x.shape)}")
    patches, width = x.shape
    if merge < 1 or patches % merge:
        raise ValueError(f"merge={merge} with x [P={patches}, C={width}]: merge must be positive and divide P")
    span = merge * width if norm_merged else width
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (span,) or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point [{span}] (C={width}, merge={merge}, norm_merged={norm_merged}), "
                f"it is {tensor.dtype} {tuple(tensor.shape)}"
            )
    if weight.dtype != bias.dtype:
        raise ValueError(f"bias is {bias.dtype} and weight {weight.dtype}: cast one, they must be of one dtype")
    if order is not None and (order.dtype != torch.int64 or order.shape != (patches,)):
        raise ValueError(f"order must be int64 [P={patches}], it is {order.dtype} {tuple(order.shape)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be positive, a constant patch has no variance")
    dispatch.check_devices("x", x.device, weight=weight, bias=bias, order=order)
    return _merge_norm(x, weight, bias, order, merge, float(eps), backend)[0]


# Which rows are normalised follows from weight's size: [C] are the patches, [merge * C] the merged rows.
@torch.library.custom_op("r4b_kernels::merge_norm", mutates_args=())
def _merge_norm(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, mean of every normalised row, reciprocal standard deviation of every normalised row)."""
    implementation = dispatch.resolve("merge_norm", x.device, backend, x, weight)
    return implementation.forward(x, weight, bias, order, merge, eps)


@_merge_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    patches, width = x.shape
    statistic = x.new_empty(patches * width // weight.shape[0], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(patches // merge, merge * width), statistic, torch.empty_like(statistic)


@torch.library.custom_op("r4b_kernels::merge_norm_backward", mutates_args=())
def _merge_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, order: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(gradient of x, [2, len(weight)]: gradients of weight and bias)."""
    implementation = dispatch.resolve("merge_norm", x.device, backend, x, weight)
    return implementation.backward(grad, x, weight, mean, rstd, order)


@_merge_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, order: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(2, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, order, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, *output[1:], order)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_x, grad_affine = _merge_norm_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_affine[0], grad_affine[1], None, None, None, None


_merge_norm.register_autograd(_backward, setup_context=_setup_context)

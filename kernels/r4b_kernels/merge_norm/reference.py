"""The definition of merge_norm, in float32, or float64 when given float64."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None, merge: int = 4, eps: float = 1e-6
) -> Tensor:
    """The op's result; differentiable by autograd. Rows of len(weight) values are normalised."""
    return forward_with_statistics(x, weight, bias, order, merge, eps)[0]


def forward_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, mean, reciprocal standard deviation), the last two one value per normalised row."""
    rows = rows_in_order(x, len(weight), order).to(accumulation_dtype(x.dtype))
    mean = rows.mean(-1, keepdim=True)
    rstd = torch.rsqrt((rows - mean).square().mean(-1, keepdim=True) + eps)
    y = (rows - mean) * rstd * weight.to(rows.dtype) + bias.to(rows.dtype)
    return y.to(x.dtype).view(x.shape[0] // merge, merge * x.shape[1]), mean.flatten(), rstd.flatten()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(grad x, [grad weight, grad bias]): dx = rstd * (g - mean(g) - n * mean(g * n)) for g = grad * weight."""
    mean, rstd = mean[:, None], rstd[:, None]
    grad = grad.to(mean.dtype).reshape(len(mean), len(weight))
    normed = (rows_in_order(x, len(weight), order) - mean) * rstd
    scaled = grad * weight.to(grad.dtype)
    projection = normed * (scaled * normed).mean(-1, keepdim=True)
    grad_rows = (rstd * (scaled - scaled.mean(-1, keepdim=True) - projection)).to(x.dtype).view(x.shape)
    grad_x = grad_rows if order is None else torch.empty_like(grad_rows).index_copy_(0, order, grad_rows)
    return grad_x, torch.stack([(grad * normed).sum(0), grad.sum(0)]).to(weight.dtype)


def rows_in_order(x: Tensor, span: int, order: Tensor | None) -> Tensor:
    """The rows [P * C / span, span] to normalise, contiguous."""
    return (x.contiguous() if order is None else x.index_select(0, order)).view(x.numel() // span, span)


def check_order(order: Tensor | None, patches: int) -> None:
    """Raise a ValueError unless order is a permutation. Reads the values: for backends that run on the host."""
    if order is None:
        return
    if order.numel() and (int(order.min()) < 0 or int(order.max()) >= patches):
        raise ValueError(f"order holds {int(order.min())} .. {int(order.max())}: the patches are 0 .. {patches - 1}")
    times = torch.bincount(order, minlength=patches)
    if bool((times != 1).any()):
        patch = int((times != 1).nonzero()[0])
        raise ValueError(f"order names patch {patch} {int(times[patch])} times: it must name every patch once")


class Backend:
    """The reference backend."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_order(order, x.shape[0])
        return forward_with_statistics(x, weight, bias, order, merge, eps)

    backward = staticmethod(backward)

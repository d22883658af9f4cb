"""The two steps of an op that is bound by memory, timed apart: each way has a floor of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = ("forward", "backward")


def timed(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, step: str) -> Callable[[], Any]:
    """What to time: calls without a gradient, or the gradients of one call, again and again."""
    if step == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    made: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not made:
            made.append(function(*inputs))
        return torch.autograd.grad(made[0], inputs, grad, retain_graph=True)

    return backward


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one shape, with a backward that may run more than once."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)

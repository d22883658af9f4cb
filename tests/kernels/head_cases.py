"""Comparisons shared by the tests of the head ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference / largest entry of the expected; 0 for empty tensors. NaN anywhere gives NaN, which fails."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def results_and_gradients(function: Callable, inputs: Sequence[Tensor], seeds: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs of ``function(*inputs)`` and the gradients of sum(seed * output) by each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((seed.to(out.dtype) * out).sum() for seed, out in zip(seeds, outputs, strict=True))
    gradients = torch.autograd.grad(total, leaves)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = relative(actual[name], value)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_no_worse(
    ours: dict[str, Tensor], rival: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 1.5
) -> None:
    """Our distance to the exact result is at most ``factor`` times the rival's (root mean square and largest)."""
    for name, value in exact.items():
        for norm in (2.0, torch.inf):
            mine = torch.linalg.vector_norm(ours[name].double() - value, norm)
            theirs = torch.linalg.vector_norm(rival[name].double() - value, norm)
            assert mine <= factor * theirs, f"{name}: error {mine:.3e}, torch's own {theirs:.3e} (norm {norm})"

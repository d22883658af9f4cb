"""swiglu against the composition that models write, and on a GPU its compiled form and Liger's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, ON_GPU, on
from benchmarks.kernels._step import STEPS, compiled, timed
from r4b_kernels import swiglu

SHAPES = on([(1500, 768), (512, 9728)], [(8192, 9728), (8192, 12288)])


def composed(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_swiglu(shape: tuple[int, int], step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1], dtype=DTYPE, requires_grad=True)
    grad = torch.randn(shape, dtype=DTYPE)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if ON_GPU else {}
    torch.testing.assert_close(swiglu(gate_up), composed(gate_up), **tolerance)
    rivals, skipped = {"torch composed": composed}, {}
    if ON_GPU:
        rivals["torch.compile"] = compiled(composed)
        if step == "backward":
            skipped["Liger"] = "writes the gradients over what it saved: it cannot be repeated"
        elif importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            # On halves that are tensors of their own, as its module has them.
            halves = [half.contiguous() for half in gate_up.detach().chunk(2, dim=-1)]
            rivals["Liger"] = lambda _: LigerSiLUMulFunction.apply(*halves)
        else:
            skipped["Liger"] = "liger-kernel is not installed"
    contest(
        timed(swiglu, [gate_up], grad, step),
        {name: timed(rival, [gate_up], grad, step) for name, rival in rivals.items()},
        bytes_moved=(3 if step == "forward" else 5) * grad.nbytes,
        flops=(5 if step == "forward" else 12) * grad.numel(),
        skipped=skipped,
    )

"""The Triton swiglu against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import swiglu
from r4b_kernels.swiglu import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

SHAPES = [(2,), (0, 8), (1, 2), (7, 66), (3, 5, 16), (5, 2600)]


def triton(gate_up: Tensor) -> Tensor:
    return swiglu(gate_up, backend="triton")


def make(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    return 3 * torch.randn(shape, dtype=dtype), [torch.randn(*shape[:-1], shape[-1] // 2).double()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_definition(shape, same_in_any_order) -> None:
    gate_up, seeds = make(*shape)
    ours = same_in_any_order(lambda: results_and_gradients(triton, (gate_up,), seeds))
    assert_close(ours, results_and_gradients(reference.forward, (gate_up,), seeds), 1e-12)


def test_float32_is_accurate() -> None:
    gate_up, seeds = make(13, 300, dtype=torch.float32)
    ours = results_and_gradients(triton, (gate_up,), seeds)
    assert_close(ours, results_and_gradients(reference.forward, (gate_up.double(),), seeds), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_the_definition_in_it(dtype: torch.dtype) -> None:
    gate_up, seeds = make(13, 300, dtype=dtype)
    ours = results_and_gradients(triton, (gate_up,), seeds)
    rival = results_and_gradients(reference.forward, (gate_up,), seeds)
    assert_no_worse(ours, rival, results_and_gradients(reference.forward, (gate_up.double(),), seeds), factor=1.05)


def test_gradcheck() -> None:
    gate_up, _ = make(3, 10)
    assert torch.autograd.gradcheck(triton, (gate_up.requires_grad_(),), fast_mode=True)


def test_strided_inputs() -> None:
    wide, seeds = make(6, 64)
    seeds = [seeds[0][:, ::2]]
    ours = results_and_gradients(lambda x: triton(x[:, ::2]), (wide,), seeds)
    assert_close(ours, results_and_gradients(lambda x: reference.forward(x[:, ::2]), (wide,), seeds), 1e-12)

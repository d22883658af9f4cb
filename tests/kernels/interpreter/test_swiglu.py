"""The Triton swiglu against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import swiglu
from r4b_kernels.swiglu import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

# The last is wider than a program's block.
SHAPES = [(2,), (0, 8), (5, 0), (1, 2), (7, 66), (3, 5, 16), (2, 126), (2, 128), (2, 130), (3, 4200)]


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


@pytest.mark.filterwarnings("ignore:overflow")  # exp(200) is infinite, as it should be
def test_extreme_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    ours = results_and_gradients(triton, (gate_up,), [torch.ones(1, 2)])
    assert ours["output 0"].tolist() == [[0.0, 200.0]] and ours["gradient 0"].tolist() == [[0.0, 1.0, 0.0, 200.0]]


def test_values_of_nan_stay_alone() -> None:
    gate_up, seeds = make(4, 66)
    clean = results_and_gradients(triton, (gate_up,), seeds)
    gate_up[2] = torch.nan
    dirty = results_and_gradients(triton, (gate_up,), seeds)
    for name, value in clean.items():
        assert dirty[name][2].isnan().all() and torch.equal(dirty[name][[0, 1, 3]], value[[0, 1, 3]]), name


def test_strided_inputs() -> None:
    wide, seeds = make(6, 64)
    seeds = [seeds[0][:, ::2]]
    ours = results_and_gradients(lambda x: triton(x[:, ::2]), (wide,), seeds)
    assert_close(ours, results_and_gradients(lambda x: reference.forward(x[:, ::2]), (wide,), seeds), 1e-12)

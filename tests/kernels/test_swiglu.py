"""swiglu against its definition, against torch's composition, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import swiglu
from r4b_kernels.swiglu import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

BACKENDS = ["cpu", "reference"]
SHAPES = [(2,), (0, 8), (1, 2), (7, 66), (3, 5, 16), (130, 514)]


def make(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    return 3 * torch.randn(shape, dtype=dtype), [torch.randn(*shape[:-1], shape[-1] // 2).double()]


def composed(gate_up: Tensor) -> Tensor:
    """What Qwen3's feed-forward block computes."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_torch(shape, backend: str) -> None:
    gate_up, seeds = make(*shape)
    ours = results_and_gradients(lambda x: swiglu(x, backend=backend), (gate_up,), seeds)
    assert_close(ours, results_and_gradients(composed, (gate_up,), seeds), 1e-12)


def test_the_gate_is_the_first_half() -> None:
    assert swiglu(torch.tensor([0.0, 40.0, 7.0, 3.0])).tolist() == [0.0, 120.0]


def test_float32_is_accurate() -> None:
    gate_up, seeds = make(150, 300, dtype=torch.float32)
    ours = results_and_gradients(swiglu, (gate_up,), seeds)
    assert_close(ours, results_and_gradients(reference.forward, (gate_up.double(),), seeds), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_no_worse_than_torch(backend: str) -> None:
    gate_up, seeds = make(150, 300, dtype=torch.bfloat16)
    ours = results_and_gradients(lambda x: swiglu(x, backend=backend), (gate_up,), seeds)
    rival = results_and_gradients(composed, (gate_up,), seeds)
    assert_no_worse(ours, rival, results_and_gradients(composed, (gate_up.double(),), seeds), factor=1.0)


def test_gradcheck() -> None:
    gate_up, _ = make(3, 10)
    assert torch.autograd.gradcheck(swiglu, (gate_up.requires_grad_(),), fast_mode=True)


def test_extreme_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    ours = results_and_gradients(swiglu, (gate_up,), [torch.ones(1, 2)])
    assert ours["output 0"].tolist() == [[0.0, 200.0]] and ours["gradient 0"].tolist() == [[0.0, 1.0, 0.0, 200.0]]


def test_strides_and_repeatability() -> None:
    wide, seeds = make(500, 128)
    seeds = [seeds[0][:, ::2]]
    runs = [results_and_gradients(lambda x: swiglu(x[:, ::2]), (wide,), seeds) for _ in range(2)]
    assert_close(runs[0], results_and_gradients(lambda x: composed(x[:, ::2]), (wide,), seeds), 1e-12)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_operator_contract() -> None:
    gate_up, _ = make(3, 4)
    for tensor in (gate_up, gate_up.clone().requires_grad_()):
        for backend in BACKENDS:
            torch.library.opcheck(torch.ops.r4b_kernels.swiglu.default, (tensor, backend))


def test_compiles_without_graph_breaks() -> None:
    gate_up, seeds = make(5, 8)
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    ours = results_and_gradients(compiled, (gate_up,), seeds)
    assert_close(ours, results_and_gradients(composed, (gate_up,), seeds), 1e-12)


@pytest.mark.parametrize("gate_up", [torch.zeros(()), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64)])
def test_errors_name_the_argument(gate_up: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gate_up must be"):
        swiglu(gate_up)

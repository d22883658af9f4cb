"""rms_norm against its definition, against transformers' Qwen3 layer, and at its edges."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels import rms_norm
from r4b_kernels.rms_norm import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

BACKENDS = ["cpu", "reference"]
SHAPES = [(2,), (5,), (0, 8), (1, 2), (7, 33), (3, 5, 16), (2, 3, 4, 128), (130, 257)]


def make(*shape: int, dtype: torch.dtype = torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), [torch.randn(shape).double()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_definition(shape, eps: float, backend: str) -> None:
    x, weight, seeds = make(*shape)
    ours = results_and_gradients(lambda x, w: rms_norm(x, w, eps=eps, backend=backend), (x, weight), seeds)
    exact = results_and_gradients(
        lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w, (x, weight), seeds
    )
    assert_close(ours, exact, 1e-12)


def test_float32_is_accurate() -> None:
    x, weight, seeds = make(150, 300, dtype=torch.float32)
    ours = results_and_gradients(lambda x, w: rms_norm(x, w), (x, weight), seeds)
    double = x.double(), weight.double()
    assert_close(ours, results_and_gradients(lambda x, w: reference.forward(x, w, 1e-6), double, seeds), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_qwen3(backend: str, dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    layer = modeling.Qwen3RMSNorm(96, eps=1e-5).to(dtype)
    x, weight, seeds = make(40, 96, dtype=dtype)

    def theirs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    ours = results_and_gradients(lambda x, w: rms_norm(x, w, eps=1e-5, backend=backend), (x, weight), seeds)
    rival = results_and_gradients(theirs, (x, weight), seeds)
    torch.testing.assert_close(ours["output 0"], rival["output 0"], rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0)
    exact = results_and_gradients(lambda x, w: reference.forward(x, w, 1e-5), (x.double(), weight.double()), seeds)
    if dtype == torch.bfloat16:
        assert_no_worse(ours, rival, exact)
    else:
        assert_close(ours, rival, 2e-6)


def test_mixed_dtypes_promote() -> None:
    x, weight, seeds = make(6, 16, dtype=torch.bfloat16)
    ours = results_and_gradients(lambda x, w: rms_norm(x, w), (x, weight.float()), seeds)
    assert [value.dtype for value in ours.values()] == [torch.float32, torch.bfloat16, torch.float32]
    exact = results_and_gradients(lambda x, w: reference.forward(x, w, 1e-6), (x, weight.float()), seeds)
    assert_close(ours, exact, 1e-2)


def test_gradcheck() -> None:
    x, weight, _ = make(3, 4, 5)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=0.1), (x, weight), fast_mode=True)


def test_zero_rows_and_strides() -> None:
    wide, weight, seeds = make(9, 24)
    wide[4] = 0
    ours = results_and_gradients(lambda x, w: rms_norm(x.T[::2].T, w[::2]), (wide, weight), [seeds[0][:, ::2]])
    exact = results_and_gradients(
        lambda x, w: reference.forward(x[:, ::2], w[::2], 1e-6), (wide, weight), [seeds[0][:, ::2]]
    )
    assert_close(ours, exact, 1e-12)
    assert not ours["output 0"][4].any()


def test_runs_repeat_bit_by_bit() -> None:
    x, weight, seeds = make(500, 128, dtype=torch.float32)
    runs = [results_and_gradients(lambda x, w: rms_norm(x, w), (x, weight), seeds) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_operator_contract() -> None:
    x, weight, _ = make(3, 4)
    for tensor in (x, x.clone().requires_grad_()):
        for backend in BACKENDS:
            torch.library.opcheck(torch.ops.r4b_kernels.rms_norm.default, (tensor, weight, 1e-6, backend))


def test_compiles_without_graph_breaks() -> None:
    x, weight, seeds = make(5, 8)
    compiled = torch.compile(lambda x, w: rms_norm(x, w), backend="aot_eager", fullgraph=True)
    ours = results_and_gradients(compiled, (x, weight), seeds)
    assert_close(ours, results_and_gradients(lambda x, w: reference.forward(x, w, 1e-6), (x, weight), seeds), 1e-12)


@pytest.mark.parametrize(
    ("x", "weight", "named"),
    [
        (torch.zeros(3, 4), torch.zeros(3), "weight must be"),
        (torch.zeros(3, 4), torch.zeros(4, 1), "weight must be"),
        (torch.zeros(()), torch.zeros(1), "weight must be"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4), "x is torch.int64"),
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), "weight torch.int64"),
        (torch.zeros(3, 4), torch.zeros(4, device="meta"), "weight is on meta and x on cpu"),
    ],
)
def test_errors_name_the_argument(x: torch.Tensor, weight: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rms_norm(x, weight)

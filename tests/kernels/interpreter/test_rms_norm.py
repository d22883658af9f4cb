"""The Triton rms_norm against its definition and transformers' Qwen3 layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from r4b_kernels import rms_norm
from r4b_kernels.rms_norm import reference
from r4b_kernels.rms_norm import triton as backend
from tests.kernels.head_cases import assert_close, assert_no_worse, relative, results_and_gradients

SHAPES = [(2,), (0, 8), (1, 2), (7, 33), (3, 5, 16), (65, 127), (5, 2560)]
EPS = 1e-5

triton = functools.partial(rms_norm, eps=EPS, backend="triton")
definition = functools.partial(reference.forward, eps=EPS)


def make(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    return (torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)), [torch.randn(shape).double()]


@pytest.fixture(params=["in registers", "in blocks"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to treat a row; in blocks of 64 columns, so that narrow rows take several."""
    if request.param == "in blocks":
        monkeypatch.setattr(backend, "WIDEST", 1)
        monkeypatch.setattr(backend, "TILE", 64)


def double(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.double() for x in inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("rows")
def test_float64_is_the_definition(shape: tuple[int, ...], same_in_any_order) -> None:
    inputs, seeds = make(*shape)
    ours = same_in_any_order(lambda: results_and_gradients(triton, inputs, seeds))
    assert_close(ours, results_and_gradients(definition, inputs, seeds), 1e-12)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 129])
def test_any_number_of_rows(count: int) -> None:
    """Tiles of 64 rows: of them none, one, some, and the first of the next."""
    inputs, seeds = make(count, 64)
    ours = results_and_gradients(triton, inputs, seeds)
    assert_close(ours, results_and_gradients(definition, inputs, seeds), 1e-12)


@pytest.mark.usefixtures("rows")
def test_a_program_takes_several_tiles(monkeypatch: pytest.MonkeyPatch, same_in_any_order) -> None:
    monkeypatch.setattr(backend, "PROGRAMS", 2)
    inputs, seeds = make(70, 130)
    ours = same_in_any_order(lambda: results_and_gradients(triton, inputs, seeds))
    assert_close(ours, results_and_gradients(definition, inputs, seeds), 1e-12)


def test_rows_beyond_the_registers() -> None:
    inputs, seeds = make(3, 8200)
    ours = results_and_gradients(triton, inputs, seeds)
    assert_close(ours, results_and_gradients(definition, inputs, seeds), 1e-12)


@pytest.mark.usefixtures("rows")
def test_float32_is_accurate() -> None:
    inputs, seeds = make(70, 300, dtype=torch.float32)
    ours = results_and_gradients(triton, inputs, seeds)
    assert_close(ours, results_and_gradients(definition, double(inputs), seeds), 2e-6)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_qwen3(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    layer = modeling.Qwen3RMSNorm(300, eps=EPS)
    inputs, seeds = make(40, 300, dtype=dtype)
    ours = results_and_gradients(triton, inputs, seeds)
    rival = results_and_gradients(lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), inputs, seeds)
    assert_no_worse(ours, rival, results_and_gradients(definition, double(inputs), seeds))
    # Bit by bit, but where the reciprocal root differs in its last bit and a quotient lies at a tie.
    assert (ours["output 0"] != rival["output 0"]).double().mean() < 1e-3
    assert relative(ours["output 0"], rival["output 0"]) <= torch.finfo(dtype).eps


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_quotient_is_rounded_before_the_weight(dtype: torch.dtype) -> None:
    (x, weight), _ = make(5, 300, dtype=dtype)
    out, rstd = backend.Backend.forward(x, weight, EPS)
    assert torch.equal(out, (x.float() * rstd).to(dtype) * weight)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    (x, weight), seeds = make(9, 64)
    inputs = x.to(dtypes[0]), weight.to(dtypes[1])
    ours = results_and_gradients(triton, inputs, seeds)
    theirs = results_and_gradients(definition, inputs, seeds)
    assert {name: value.dtype for name, value in ours.items()} == {name: x.dtype for name, x in theirs.items()}
    assert_close(ours, theirs, 2 * torch.finfo(dtypes[0]).eps)


@pytest.mark.usefixtures("rows")
def test_gradcheck() -> None:
    (x, weight), _ = make(3, 70)
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=0.1, backend="triton"), leaves, fast_mode=True)


def test_strided_inputs_and_zero_rows() -> None:
    (wide, weight), seeds = make(9, 24)
    wide[4] = 0
    seeds = [seeds[0][:, ::2]]
    ours = results_and_gradients(lambda x, w: triton(x[:, ::2], w[::2]), (wide, weight), seeds)
    assert_close(ours, results_and_gradients(lambda x, w: definition(x[:, ::2], w[::2]), (wide, weight), seeds), 1e-12)
    assert not ours["output 0"][4].any()


def test_a_row_of_nan_stays_alone() -> None:
    (x, weight), _ = make(6, 64)
    clean = rms_norm(x, weight, backend="triton")
    x[2] = torch.nan
    dirty = rms_norm(x, weight, backend="triton")
    assert dirty[2].isnan().all()
    assert torch.equal(dirty[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])

"""The Triton merge_norm against its definition and torch's LayerNorm."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from r4b_kernels import BackendError, merge_norm
from r4b_kernels.merge_norm import reference
from r4b_kernels.merge_norm import triton as backend
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients
from tests.kernels.test_merge_norm import composed, make

# P, C, merge: tiles of one and of many patches, merges that are a power of two and not
SHAPES = [(4, 6, 4), (12, 5, 3), (1, 1, 1), (65, 64, 1), (66, 40, 3), (0, 8, 4), (8, 130, 4)]


def triton(merge: int = 4, norm_merged: bool = False, order: Tensor | None = None) -> functools.partial:
    return functools.partial(merge_norm, merge=merge, norm_merged=norm_merged, order=order, backend="triton")


def definition(merge: int = 4, norm_merged: bool = False, order: Tensor | None = None) -> functools.partial:
    return functools.partial(reference.forward, merge=merge, order=order)


@pytest.mark.parametrize("norm_merged", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_definition(
    shape: tuple[int, int, int], ordered: bool, norm_merged: bool, same_in_any_order
) -> None:
    inputs, seeds = make(*shape, norm_merged)
    case = shape[2], norm_merged, torch.randperm(shape[0]) if ordered else None
    ours = same_in_any_order(lambda: results_and_gradients(triton(*case), inputs, seeds))
    assert_close(ours, results_and_gradients(definition(*case), inputs, seeds), 1e-12)


@pytest.mark.parametrize("norm_merged", [False, True])
def test_a_program_takes_several_tiles(norm_merged: bool, monkeypatch: pytest.MonkeyPatch, same_in_any_order) -> None:
    monkeypatch.setattr(backend, "PROGRAMS", 2)
    monkeypatch.setattr(backend, "TILE", 64)
    inputs, seeds = make(27, 20, 3, norm_merged)
    case = 3, norm_merged, torch.randperm(27)
    ours = same_in_any_order(lambda: results_and_gradients(triton(*case), inputs, seeds))
    assert_close(ours, results_and_gradients(definition(*case), inputs, seeds), 1e-12)


@pytest.mark.parametrize("norm_merged", [False, True])
def test_float32_is_accurate(norm_merged: bool) -> None:
    inputs, seeds = make(64, 96, 4, norm_merged, torch.float32)
    ours = results_and_gradients(triton(4, norm_merged), inputs, seeds)
    exact = results_and_gradients(composed(4, norm_merged), [x.double() for x in inputs], seeds)
    assert_close(ours, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_merged", [False, True])
def test_half_precision_is_no_worse_than_torch(norm_merged: bool, dtype: torch.dtype) -> None:
    inputs, seeds = make(64, 96, 4, norm_merged, dtype)
    seeds = [seeds[0].to(dtype).double()]
    ours = results_and_gradients(triton(4, norm_merged), inputs, seeds)
    rival = results_and_gradients(composed(4, norm_merged), inputs, seeds)
    exact = results_and_gradients(composed(4, norm_merged), [x.double() for x in inputs], seeds)
    assert_no_worse(ours, rival, exact)


def test_float32_parameters_of_bfloat16_patches() -> None:
    (x, *parameters), seeds = make(8, 16, 4, dtype=torch.float32)
    inputs = x.bfloat16(), *parameters
    ours = results_and_gradients(triton(), inputs, seeds)
    assert [value.dtype for value in ours.values()] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert_close(ours, results_and_gradients(definition(), inputs, seeds), 2**-8)


@pytest.mark.parametrize("norm_merged", [False, True])
def test_gradcheck(norm_merged: bool) -> None:
    inputs, _ = make(6, 5, 3, norm_merged)
    call = functools.partial(triton(3, norm_merged, torch.randperm(6)), eps=0.1)
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_strided_inputs() -> None:
    inputs, seeds = make(8, 12, 4)
    order = torch.stack([torch.randperm(8)] * 2, -1)[:, 0]
    seeds = [seeds[0][:, ::2]]
    ours, theirs = (
        results_and_gradients(lambda x, w, b, f=f: f(4, False, order)(x[:, ::2], w[::2], b[::2]), inputs, seeds)
        for f in (triton, definition)
    )
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("norm_merged", [False, True])
def test_a_patch_of_nan_stays_in_its_row(norm_merged: bool) -> None:
    inputs, _ = make(16, 6, 4, norm_merged)
    clean = triton(4, norm_merged)(*inputs)
    inputs[0][5] = torch.nan
    dirty = triton(4, norm_merged)(*inputs)
    assert torch.equal(dirty[[0, 2, 3]], clean[[0, 2, 3]])
    assert torch.equal(dirty[1].isnan(), torch.arange(24) // 6 == 1) or norm_merged and dirty[1].isnan().all()


@pytest.mark.parametrize("bad", [-1, 16, 2**40, 3])
@pytest.mark.parametrize("norm_merged", [False, True])
def test_a_wrong_order_shows(norm_merged: bool, bad: int, same_in_any_order) -> None:
    """Patch 7 loses its place to a patch that does not exist, or has one already: its gradient is NaN."""
    (x, weight, bias), seeds = make(16, 6, 4, norm_merged)
    order = torch.arange(16)
    order[7] = bad

    def run() -> dict[str, Tensor]:
        y, mean, rstd = backend.Backend.forward(x, weight, bias, order, 4, 1e-6)
        grad_x, grad_affine = backend.Backend.backward(seeds[0], x, weight, mean, rstd, order)
        return {"y": y, "grad_x": grad_x, "grad_affine": grad_affine}

    result = same_in_any_order(run)
    known = bad == 3
    assert result["y"][1].isnan().any() == (not known) and result["y"][[0, 2, 3]].isfinite().all()
    assert result["grad_x"][7].isnan().all()
    assert result["grad_x"][8:].isfinite().all() and result["grad_x"][:3].isfinite().all()
    assert result["grad_affine"][0].isnan().any() == (not known)


def test_rows_beyond_the_registers_are_refused() -> None:
    inputs, _ = make(4, 2049, 4, norm_merged=True)
    with pytest.raises(BackendError, match="rows of up to 8192 values"):
        triton(4, True)(*inputs)

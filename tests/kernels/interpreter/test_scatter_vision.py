"""The Triton scatter_vision against its definition, row by row."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from r4b_kernels import scatter_vision
from r4b_kernels.scatter_vision import reference
from r4b_kernels.scatter_vision import triton as backend
from r4b_kernels.scatter_vision.triton import Backend
from tests.kernels.head_cases import assert_close, results_and_gradients

# index, number of feature rows
INDEXES = {
    "two_images": ([-1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, 8, -1], 9),
    "backwards": (list(range(17))[::-1], 17),
    "with_separators": ([*range(6), 21, *range(6, 12), 21, -1, -1, *range(12, 18), 21, *range(18, 21), 21], 22),
    "twice": ([*range(9), -1, *range(9)], 11),
    "shared_by_many": ([i * 7 % 5 - 1 for i in range(70)], 4),
    "far_apart": ([2, *[-1] * 50, 2, 0, 2], 3),
    "all_text": ([-1] * 7, 3),
    "no_features": ([-1] * 5, 0),
    "no_tokens": ([], 3),
}
WIDTHS = {"two_images": 4100, "with_separators": 600}  # else 6


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tokens of a shared row lie in several."""
    monkeypatch.setattr(backend, "SHARED_CHUNK", 16)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """index, [embeddings, features], [gradient of the result]."""
    values, rows = INDEXES[name]
    width = WIDTHS.get(name, 6)
    index = torch.tensor(values, dtype=torch.int64)
    inputs = [torch.randn(count, width, dtype=dtype) for count in (len(index), rows)]
    return index, inputs, [torch.randn(len(index), width).double()]


def triton(index: Tensor, accumulate: bool) -> functools.partial:
    return functools.partial(scatter_vision, index=index, accumulate=accumulate, backend="triton")


def definition(index: Tensor, accumulate: bool) -> functools.partial:
    return functools.partial(reference.scatter_vision, index=index, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", INDEXES)
def test_float64_is_the_definition(name: str, accumulate: bool, same_in_any_order) -> None:
    index, inputs, seeds = make(name)
    index = index.to(torch.int32 if accumulate else torch.int64)
    ours = same_in_any_order(lambda: results_and_gradients(triton(index, accumulate), inputs, seeds))
    assert_close(ours, results_and_gradients(definition(index, accumulate), inputs, seeds), 1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["two_images", "with_separators", "shared_by_many"])
def test_one_rounding_of_the_exact_sum(name: str, dtype: torch.dtype, accumulate: bool) -> None:
    index, inputs, seeds = make(name, dtype)
    seeds = [seeds[0].to(dtype).double()]
    ours = results_and_gradients(triton(index, accumulate), inputs, seeds)
    exact = results_and_gradients(definition(index, accumulate), [x.double() for x in inputs], seeds)
    for key, value in exact.items():
        assert ours[key].dtype == dtype
        assert ((ours[key] - value).abs() <= torch.finfo(dtype).eps * value.abs() + 1e-5).all(), key


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradcheck(accumulate: bool) -> None:
    index, inputs, _ = make("twice")
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(triton(index, accumulate), leaves, fast_mode=True)


def test_strided_inputs() -> None:
    index, inputs, seeds = make("with_separators")
    wide = [torch.stack([x, x + 1], -1).flatten(-2) for x in inputs]
    every_other = torch.stack([index, index], -1)[:, 0]
    ours = results_and_gradients(lambda e, f: triton(every_other, True)(e[:, ::2], f[:, ::2]), wide, seeds)
    theirs = results_and_gradients(lambda e, f: definition(index, True)(e[:, ::2], f[:, ::2]), wide, seeds)
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bad", [-2, 11, 2**40, -(2**40)])
def test_a_bad_index_makes_its_own_row_nan(bad: int, accumulate: bool) -> None:
    """Nobody waits for the index of a GPU: the rows it touches say so, and nothing is read or written outside."""
    index, inputs, seeds = make("twice")
    clean = results_and_gradients(triton(index, accumulate), inputs, seeds)
    assert index[9] == -1
    index[9] = bad
    out = Backend.forward(*inputs, index, accumulate)
    grad_embeddings, grad_features = Backend.backward(seeds[0], index, 11, accumulate)
    others = torch.arange(len(index)) != 9
    assert out[9].isnan().all() and torch.equal(out[others], clean["output 0"][others])
    assert torch.equal(grad_features, clean["gradient 1"])
    if not accumulate:
        assert grad_embeddings[9].isnan().all()
        assert torch.equal(grad_embeddings[others], clean["gradient 0"][others])


@pytest.mark.parametrize("accumulate", [False, True])
def test_rows_of_nan_stay_alone(accumulate: bool) -> None:
    """A feature nobody uses, the embedding that is replaced and the gradient of text reach nothing."""
    index, inputs, seeds = make("twice")
    clean = results_and_gradients(triton(index, accumulate), inputs, seeds)
    inputs[1][10] = torch.nan
    if not accumulate:
        inputs[0][3] = torch.nan
    seeds[0][9] = torch.nan
    dirty = results_and_gradients(triton(index, accumulate), inputs, seeds)
    assert torch.equal(dirty["output 0"], clean["output 0"])
    assert torch.equal(dirty["gradient 1"], clean["gradient 1"])

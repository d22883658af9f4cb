"""The chunk machinery of the head ops: chunk lengths, products into float32, views, rows, and summed gradients."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels import head_chunks
from r4b_kernels.head_chunks import ChunkBuffers, GradientAccumulator, chunk_rows, narrow_view, product, split_rows
from tests.kernels.head_cases import relative


@pytest.mark.parametrize("vocabulary", [151936, 75968, 32000, 64, 400_000])
@pytest.mark.parametrize("rows", [1, 100, 1665, 8192, 100_000])
def test_chunks_of_a_gpu_fit_in_a_gibibyte_and_are_about_equal(rows: int, vocabulary: int) -> None:
    length = chunk_rows(rows, vocabulary, 4, on_cpu=False)
    assert 4 * length * vocabulary <= 2**30 and length <= rows
    chunks = -(-rows // length)
    assert length == rows or length % 128 == 0
    assert rows - (chunks - 1) * length >= length - 128 * chunks, "the last chunk is not much shorter"


def test_the_size_named_in_the_readme() -> None:
    assert chunk_rows(8192, 151936, 4, on_cpu=False) == 1664


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 7, 40), (5, 40, 7), (1, 1, 1), (0, 3, 4)])
def test_product_rounds_nothing_to_half(
    dtype: torch.dtype, rows: int, inner: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "_WIDEN_ELEMENTS", 64)
    a, b, start = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype), torch.randn(rows, columns)
    exact = 0.5 * a.double() @ b.double()
    assert relative(product(a, b, torch.full_like(start, torch.nan), 0.5), exact) < 1e-6
    assert relative(product(a, b, start.clone(), 0.5, add=True), exact + start) < 1e-6
    assert relative(product(a.float(), b, torch.empty_like(start), 0.5), exact) < 1e-6


def test_narrow_view_can_be_filled_from_the_left() -> None:
    wide = torch.randn(6, 37)
    expected, narrow = wide.bfloat16(), narrow_view(wide, torch.bfloat16)
    for start in range(0, 37, 8):
        block = slice(start, start + 8)
        narrow[:, block] = wide[:, block].clone().bfloat16()
    assert torch.equal(narrow, expected) and narrow.data_ptr() == wide.data_ptr()
    assert narrow_view(wide, torch.float32) is wide


@pytest.mark.parametrize("mask", [[True] * 4, [False] * 4, [True, False, False, True], []], ids=str)
def test_split_rows(mask: list[bool]) -> None:
    some = torch.tensor(mask, dtype=torch.bool)
    for part, chosen in zip(split_rows(some, ~some), (some, ~some), strict=True):
        assert part.count == int(chosen.sum())
        everything = torch.arange(len(mask))
        assert torch.equal(everything[part[slice(0, part.count)]], everything[chosen])


def test_nothing_is_read_on_meta() -> None:
    hidden, weight = torch.empty(300, 8, device="meta"), torch.empty(50, 8, device="meta")
    mask = torch.empty(300, dtype=torch.bool, device="meta")
    live, idle = split_rows(mask, ~mask)
    assert (live.count, idle.count) == (300, 0)
    assert ChunkBuffers(300, hidden, weight).logits(hidden, weight, 0.7).shape == (300, 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_summed_over_chunks_with_a_factor_per_row(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, 5, dtype=dtype), torch.randn(20, 5, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_z, scale = torch.randn(7, 20, dtype=wide), torch.rand(7, dtype=wide)
    rows = torch.tensor([0, 2, 3, 4, 6, 7, 8])
    gradients = GradientAccumulator(hidden, weight, True, True)
    for chunk in (slice(0, 4), slice(4, 7)):
        gradients.add(rows[chunk], grad_z[chunk], hidden[rows[chunk]], scale[chunk])
    grad_hidden, grad_weight = gradients.exact_result(None)
    exact = (scale[:, None] * grad_z).double()
    tolerance = 1e-14 if dtype == torch.float64 else 6e-3
    assert relative(grad_hidden[rows], exact @ weight.double()) < tolerance and not grad_hidden[[1, 5]].any()
    assert relative(grad_weight, exact.T @ hidden[rows].double()) < tolerance and grad_weight.dtype == wide

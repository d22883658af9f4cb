"""The Triton decode_attention against its definition, whatever unused memory holds and whichever program is first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_kernels.decode_attention import triton as implementation
from tests.kernels.decode_cases import CACHES, as_dtype, error, make_case, run, without_rows
from tests.kernels.head_cases import assert_no_worse

SMALL = implementation.Tile(shared=16, own=16, steps=16, stretch=32, warps=4, stages=1)
# Prompts of nothing, of one key, and around whole stretches; so many tokens of responses, too. P and M are no vectors.
LENGTHS, COLUMNS = [65, 0, 1, 63, 64], [-1, 0, 62, 63, 64, 65, 3]


@pytest.fixture
def small_tile() -> Iterator[None]:
    implementation.override = SMALL
    yield
    implementation.override = None


def edges(share: int, dim: int, heads: int = 1) -> dict[str, Any]:
    """Seven rows of five prompts, one of which has none; unused columns are NaN."""
    inputs = make_case((1, 2, 1, 0, 3), share, dim, 65, 65, heads)
    inputs["prompt_lengths"], inputs["column"] = torch.tensor(LENGTHS), torch.tensor(COLUMNS)
    unused = torch.arange(65) >= inputs["prompt_lengths"][:, None]
    unwritten = torch.arange(65) > inputs["column"][:, None]
    for name in ("prompt", "own"):
        hidden = unused if name == "prompt" else unwritten
        inputs[f"{name}_keys"] = torch.where(hidden[:, None], torch.nan, inputs[f"{name}_keys"].clamp(-4, 4))
        inputs[f"{name}_values"] = torch.where(hidden[..., None], torch.nan, inputs[f"{name}_values"].clamp(-4, 4))
    return inputs


def seen(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the NaN that nobody wrote."""
    return {name: x.nan_to_num(0.0) for name, x in result.items()}


@pytest.mark.parametrize(("share", "dim", "heads"), [(1, 6, 1), (3, 24, 2), (17, 16, 1)])
def test_float64_is_the_definition(share: int, dim: int, heads: int, small_tile, same_in_any_order) -> None:
    inputs = edges(share, dim, heads)
    exact = run(inputs, "reference", eps=1e-3, scale=0.3)
    twice = same_in_any_order if share == 3 else lambda function: function()
    got = twice(lambda: run(inputs, "triton", eps=1e-3, scale=0.3))
    assert got["out"].isfinite().all()
    assert max(error(seen(got), seen(exact)).values()) < 1e-12


def test_float32_is_accurate(small_tile) -> None:
    inputs = edges(2, 32)
    got = run(as_dtype(inputs, torch.float32), "triton")
    assert max(error(seen(got), seen(run(inputs, "reference"))).values()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, small_tile) -> None:
    inputs = as_dtype(edges(4, 32), dtype)
    inputs = {name: x.nan_to_num(0.0) if x.is_floating_point() else x for name, x in inputs.items()}
    exact = run(as_dtype(inputs, torch.float64), "reference")
    assert_no_worse(run(inputs, "triton"), run(inputs, "torch"), exact)


def test_the_tiles_of_a_gpu() -> None:
    """Two stretches of a prompt, two tiles of its queries."""
    inputs = make_case((5,), 16, 16, 520, 8, heads=1)
    got = run(inputs, "triton")
    assert max(error(got, run(inputs, "reference")).values()) < 1e-12


def test_a_row_does_not_depend_on_the_others_to_the_bit(small_tile) -> None:
    # A row is a tile: the host's matrix product rounds otherwise at another place of it, a GPU's does not.
    inputs = as_dtype(make_case((3, 2), 16, 16, 40, 40, heads=1), torch.float32)
    whole = run(inputs, "triton")["out"]
    for n in (2, 4):
        g = int(n >= 3)
        one = dict(inputs, offsets=torch.tensor([0, 1]), prompt_lengths=inputs["prompt_lengths"][g : g + 1])
        for name in ("mixed", "column"):
            one[name] = inputs[name][n : n + 1]
        for name in ("rope", *CACHES):
            one[name] = inputs[name][:, n : n + 1].contiguous()
        for name in ("prompt_keys", "prompt_values"):
            one[name] = inputs[name][:, g : g + 1].contiguous()
        assert torch.equal(run(one, "triton")["out"][0], whole[n])


def test_sizes_of_nothing() -> None:
    inputs = as_dtype(make_case((2, 1), 2, 16, 8, 8), torch.float32)
    inputs["column"][:] = torch.tensor([-1, -1, 3])
    inputs["prompt_lengths"][0] = 0
    out = run(inputs, "triton")["out"]
    assert out[:2].isnan().all() and out[2].isfinite().all()
    assert run(as_dtype(without_rows(), torch.float32), "triton")["out"].shape == (0, 64)
    empty = dict(inputs, prompt_keys=torch.empty(2, 2, 16, 0), prompt_values=torch.empty(2, 2, 0, 16))
    empty["prompt_lengths"] = torch.zeros(2, dtype=torch.int64)
    got, exact = (run(empty, backend)["out"] for backend in ("triton", "reference"))
    torch.testing.assert_close(got, exact, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "values", "broken"),
    [
        ("offsets", [0, 9, 5], [0, 1, 2, 3, 4]),
        ("offsets", [0, 6, 5], [0, 1, 2, 3, 4]),
        ("offsets", [-3, 2, 4], [0, 1, 2, 3, 4]),
        ("offsets", [1, 3, 5], [0, 1, 2, 3, 4]),
        ("prompt_lengths", [9, 3], [0, 1, 2]),
        ("prompt_lengths", [3, -1], [3, 4]),
        ("column", [1, 2, -2, 2**40, 1], [2]),
    ],
    ids=str,
)
def test_broken_numbers_are_not_a_number_and_stay_inside(name: str, values: list[int], broken: list[int]) -> None:
    """What the host cannot check on a GPU: the backend itself gets them, under checked bounds."""
    inputs = as_dtype(make_case((3, 2), 2, 16, 8, 8), torch.float32)
    inputs[name] = torch.tensor(values)
    out = implementation.Backend.forward(*inputs.values(), 1e-6, 0.25)
    assert out.isnan().all(1).nonzero().flatten().tolist() == broken


@pytest.mark.filterwarnings("ignore:overflow")
def test_extreme_scores(small_tile) -> None:
    inputs = make_case((3, 2), 2, 16, 40, 40)
    inputs["q_weight"] *= 300
    exact = run(inputs, "reference")
    assert error(run(as_dtype(inputs, torch.float32), "triton"), exact)["out"] < 1e-3

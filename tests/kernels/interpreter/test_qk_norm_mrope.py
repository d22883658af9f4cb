"""The Triton qk_norm_mrope against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import BackendError, qk_norm_mrope
from r4b_kernels.qk_norm_mrope import pair_axes, reference
from r4b_kernels.qk_norm_mrope import triton as backend
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients
from tests.kernels.test_qk_norm_mrope import run, tensors, transformers_qwen3

KINDS = {
    "plain": {},
    "chunked": {"sections": [4, 6, 6]},
    "interleaved": {"sections": [6, 5, 5], "interleaved": True},
}


def make(
    tokens: int, hq: int = 5, hk: int = 2, dim: int = 32, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, q_weight, k_weight) and the gradients of the outputs."""
    q, k, grad_q, grad_k = (torch.randn(tokens, heads, dim).to(dtype) for heads in (hq, hk, hq, hk))
    weights = [(1 + torch.randn(dim) / 4).to(dtype) for _ in range(2)]
    return [q, k, *weights], [grad_q.double(), grad_k.double()]


def positions(tokens: int, limit: int = 3000, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, limit, (3, tokens)).to(dtype)


def ours(inputs: list[Tensor], seeds: list[Tensor], position_ids: Tensor, theta: float = 1e4, **settings):
    return results_and_gradients(
        lambda *x: qk_norm_mrope(*x, position_ids, theta=theta, backend="triton", **settings), inputs, seeds
    )


def truth(
    inputs: list[Tensor],
    seeds: list[Tensor],
    position_ids: Tensor,
    theta: float = 1e4,
    sections: list[int] | None = None,
    interleaved: bool = False,
):
    axes = pair_axes(inputs[0].shape[-1], sections, interleaved)
    return results_and_gradients(lambda *x: reference.qk_norm_mrope(*x, position_ids, theta, axes, 1e-6), inputs, seeds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 129])
def test_float64_is_the_definition(tokens: int, kind: str, same_in_any_order) -> None:
    inputs, seeds = make(tokens)
    position_ids = positions(tokens, dtype=torch.int32)
    mine = same_in_any_order(lambda: ours(inputs, seeds, position_ids, **KINDS[kind]))
    assert_close(mine, truth(inputs, seeds, position_ids, **KINDS[kind]), 1e-12)


@pytest.mark.parametrize(("hq", "hk", "dim"), [(1, 1, 2), (3, 1, 72), (4, 4, 80), (2, 1, 96), (9, 3, 128), (2, 1, 256)])
def test_heads_and_widths(hq: int, hk: int, dim: int) -> None:
    inputs, seeds = make(17, hq, hk, dim)
    position_ids = positions(17)
    assert_close(ours(inputs, seeds, position_ids), truth(inputs, seeds, position_ids), 1e-12)


def test_heads_are_walked_by_one_program_or_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seeds = make(70, 13, 3)
    position_ids = positions(70)
    expected = truth(inputs, seeds, position_ids)
    for programs in (1, 4, 512):
        monkeypatch.setattr(backend, "ENOUGH_PROGRAMS", programs)
        assert_close(ours(inputs, seeds, position_ids), expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_accurate(kind: str) -> None:
    """Against the definition in float32, whose angles are the rollouts', and at short range against the exact one."""
    inputs, seeds = make(65, dtype=torch.float32)
    position_ids = positions(65, 100_000)
    narrow = truth(inputs, seeds, position_ids, theta=5e6, **KINDS[kind])
    assert_close(ours(inputs, seeds, position_ids, theta=5e6, **KINDS[kind]), narrow, 2e-6)
    wide = truth([x.double() for x in inputs], seeds, position_ids % 4, **KINDS[kind])
    assert_close(ours(inputs, seeds, position_ids % 4, **KINDS[kind]), wide, 2e-6)


@pytest.mark.parametrize("interleaved", [True, False], ids=["qwen3_vl", "qwen2_vl"])
def test_is_transformers(interleaved: bool) -> None:
    """The norm, embedding and rotation of transformers itself, far from the start of a sequence."""
    inputs, position_ids = tensors(65, torch.float32), positions(65, 100_000)
    results = (
        transformers_qwen3(inputs, position_ids, [6, 5, 5], interleaved),
        run(inputs, position_ids, "triton", sections=[6, 5, 5], interleaved=interleaved),
    )
    expected, mine = ({name: value.detach() for name, value in result.items()} for result in results)
    assert_close(mine, expected, 2e-6)


@pytest.mark.parametrize("limit", [4, 3000, 100_000, 1_000_000])
def test_angles_are_turned_exactly(limit: int) -> None:
    """A head of ones comes out as cos - sin and cos + sin of the float32 angle, taken in float64."""
    half, tokens = 16, 512
    ones = torch.ones(tokens, 1, 2 * half)
    position_ids = positions(tokens, limit)
    out, _ = qk_norm_mrope(ones, ones, *torch.ones(2, 2 * half), position_ids, theta=5e6, eps=0.0, backend="triton")
    angle = position_ids[0][:, None].float() * reference.frequencies(2 * half, 5e6, torch.float32, out.device)
    cos, sin = angle.double().cos(), angle.double().sin()
    expected = torch.cat([cos - sin, cos + sin], dim=1)[:, None]
    assert float((out.double() - expected).abs().max()) <= 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    inputs, seeds = make(129, dtype=dtype)
    position_ids = positions(129, 4)
    exact = truth([x.double() for x in inputs], seeds, position_ids)
    assert_no_worse(ours(inputs, seeds, position_ids), truth(inputs, seeds, position_ids), exact, factor=1.05)


def test_bfloat16_rounds_where_transformers_does() -> None:
    """In all but a few entries the very bits of the definition, the rounding of Qwen3."""
    inputs, seeds = make(129, dtype=torch.bfloat16)
    position_ids = positions(129, 100_000)
    mine, expected = ours(inputs, seeds, position_ids), truth(inputs, seeds, position_ids)
    for name in ("output 0", "output 1"):
        assert float((mine[name] != expected[name]).double().mean()) < 1e-3, name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_another_dtype(weights: torch.dtype) -> None:
    inputs, seeds = make(33, dtype=torch.bfloat16)
    inputs[2:] = [x.to(weights) for x in inputs[2:]]
    position_ids = positions(33)
    mine, expected = ours(inputs, seeds, position_ids), truth(inputs, seeds, position_ids)
    assert mine["gradient 2"].dtype == mine["gradient 3"].dtype == weights
    assert_close(mine, expected, 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    inputs, _ = make(5, 3, 1)
    position_ids = positions(5, 50)
    assert torch.autograd.gradcheck(
        lambda *x: qk_norm_mrope(*x, position_ids, theta=1e4, backend="triton", **KINDS[kind]),
        [x.requires_grad_() for x in inputs],
        fast_mode=True,
    )


def test_slices_of_one_projection_and_expanded_positions() -> None:
    """q and k as a model cuts them out of one tensor, their gradients as attention may hand them back."""
    joint = torch.randn(37, 8 * 32, dtype=torch.float64)
    weights = make(1)[0][2:]
    position_ids = torch.arange(37).expand(3, -1)
    seeds = [torch.randn(5, 37, 32).double().transpose(0, 1), torch.randn(37, 2, 64).double()[..., ::2]]

    def cut(function, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = x.view(37, 8, 32).split([5, 2, 1], dim=1)
        return function(q, k, *weights)

    def run(function) -> dict[str, Tensor]:
        return results_and_gradients(lambda *x: cut(function, *x), [joint, *weights], seeds)

    mine = run(lambda *x: qk_norm_mrope(*x, position_ids, theta=1e4, backend="triton"))
    assert_close(mine, run(lambda *x: reference.qk_norm_mrope(*x, position_ids, 1e4, [], 1e-6)), 1e-12)


def test_entries_of_a_head_apart() -> None:
    inputs, seeds = make(9)
    position_ids = torch.randint(0, 50, (9, 3)).T

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    expected = truth(inputs, seeds, position_ids, **KINDS["chunked"])
    assert_close(ours([spread(x) for x in inputs], seeds, position_ids, **KINDS["chunked"]), expected, 1e-12)


def test_a_row_does_not_touch_its_neighbours() -> None:
    """NaN in padding rows stays in them: outputs and input gradients of the others are the same bits."""
    inputs, seeds = make(40)
    position_ids = positions(40)
    clean = ours(inputs, seeds, position_ids)
    for x in (*inputs[:2], *seeds):
        x[30:] = torch.nan
    dirty = ours(inputs, seeds, position_ids)
    for name in ("output 0", "output 1", "gradient 0", "gradient 1"):
        assert torch.equal(dirty[name][:30], clean[name][:30]), name


def test_refuses_heads_that_do_not_fit() -> None:
    wide = torch.zeros(1, 1, 2048)
    with pytest.raises(BackendError, match="head_dim 2048"):
        qk_norm_mrope(wide, wide, *torch.ones(2, 2048), positions(1), theta=1e4, backend="triton")

"""The Triton linear_distill against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_kernels import head_chunks, linear_distill
from r4b_kernels.dispatch import BackendError
from r4b_kernels.linear_distill import triton as ours
from tests.kernels.distill_cases import DIVERGENCES, definition, double, make, with_gradients
from tests.kernels.head_cases import assert_close, assert_no_worse

# T, H, V, K
SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (9, 5, 6, 6), (9, 35, 40, 7)]


def with_triton(
    hidden: Tensor, weight: Tensor, rows: dict[str, Tensor], backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    return with_gradients(
        lambda h, w: linear_distill(h, w, **rows, **options, backend=backend)._asdict(), hidden, weight
    )


def exact(hidden: Tensor, weight: Tensor, rows: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return with_gradients(lambda h, w: definition(h, w, rows, **options), hidden.double(), weight.double())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 4)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_definition(shape, divergence: str, tail: bool, small_chunks, same_in_any_order) -> None:
    case, options = make(*shape), {"divergence": divergence, "beta": 0.3, "temperature": 0.7, "tail": tail}
    mine = same_in_any_order(lambda: with_triton(*case, **options))
    assert_close(mine, exact(*case, **options), 1e-12)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_accurate(divergence: str, tail: bool) -> None:
    hidden, weight, rows = make(12, 33, 70, 9, torch.float32)
    options = {"divergence": divergence, "tail": tail}
    mine, truth = with_triton(hidden, weight, rows, **options), exact(hidden, weight, double(rows), **options)
    assert_close(mine, truth, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_is_no_worse_than_torch(divergence: str, tail: bool, dtype: torch.dtype) -> None:
    hidden, weight, rows = make(12, 33, 70, 9, dtype)
    hidden = hidden.nan_to_num(0.0)
    options = {"divergence": divergence, "tail": tail}

    def torch_own(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        """The definition on logits as torch rounds them."""
        identity = torch.eye(w.shape[0], dtype=torch.float64)
        return definition((h @ w.T).double(), identity, rows, **options)

    mine, rival = with_triton(hidden, weight, rows, **options), with_gradients(torch_own, hidden, weight)
    truth = exact(hidden, weight, double(rows), **options)
    assert_no_worse(mine, rival, {name: truth[name] for name in ("divergence", "hidden", "weight")})


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, tail: bool) -> None:
    hidden, weight, rows = make(5, 4, 7, 3)
    rows["row_weight"][hidden.isnan().any(1)] = 0.0
    hidden = hidden.nan_to_num(0.3).requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        options = {"divergence": divergence, "beta": 0.6, "temperature": 0.7, "tail": tail}
        return linear_distill(h, w, **rows, **options, backend="triton").loss

    assert torch.autograd.gradcheck(loss, (hidden, weight.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sure", [True, False])
def test_extreme_students(sure: bool, dtype: torch.dtype, divergence: str) -> None:
    """Logits of 256 on the ids, or on all others: the slope of the tail is nothing beside that of the ids."""
    hidden, weight, rows = make(8, 4, 9, 3, dtype)
    rows["teacher_ids"] = torch.arange(3).expand(8, 3).contiguous()
    rows["teacher_logprobs"] = torch.randn(8, 3).log_softmax(1) - 0.1
    rows["row_weight"].fill_(1e-4)
    hidden = hidden.nan_to_num(0.5)
    hidden[:, 0] = 256.0
    weight[:, 0] = torch.where((torch.arange(9) < 3) == sure, 1.0, 0.0)
    mine, truth = (
        with_triton(hidden, weight, rows, divergence=divergence),
        exact(hidden, weight, double(rows), divergence=divergence),
    )
    torch.testing.assert_close(mine["student_mass"], truth.pop("student_mass").float())
    assert_close(mine, truth, 5e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("teacher", [0.0, -1000.0, -60.0, -torch.inf])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_extreme_teachers(teacher: float, divergence: str) -> None:
    hidden, weight, rows = make(8, 4, 9, 3)
    rows["teacher_logprobs"] = torch.full((8, 3), -1000.0).double()
    rows["teacher_logprobs"][:, 1] = teacher
    mine = with_triton(hidden, weight, rows, divergence=divergence)
    assert_close(mine, exact(hidden, weight, rows, divergence=divergence), 1e-11)


@pytest.mark.parametrize("tail", [True, False])
def test_what_the_host_refuses_ends_as_nan_in_its_row(tail: bool) -> None:
    hidden, weight, rows = make(8, 4, 9, 3)
    rows["teacher_ids"] = torch.arange(3).expand(8, 3).contiguous()
    rows["teacher_logprobs"] = torch.full((8, 3), -1.2).double()
    rows["row_weight"].fill_(1.0)
    hidden = hidden.nan_to_num(0.5).requires_grad_()
    rows["teacher_ids"][2, 1] = 9
    rows["teacher_ids"][5, 2] = 0
    rows["teacher_logprobs"][6, 0] = torch.nan
    result = linear_distill(hidden, weight, **rows, tail=tail, backend="triton")
    bad = [False, False, True, False, False, True, True, False]
    assert result.divergence.isnan().tolist() == bad and bool(result.loss.isnan())
    result.loss.backward()
    assert hidden.grad.isnan().any(1).tolist() == bad


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_dead_rows_and_unused_slots_may_hold_anything(poison: float, tail: bool) -> None:
    hidden, weight, rows = make(13, 5, 30, 7)
    dead, unused = hidden.isnan().any(1), rows["teacher_ids"] < 0
    clean = with_triton(hidden.nan_to_num(0.0), weight, rows, tail=tail)
    hidden[dead] = poison
    rows["teacher_logprobs"][dead[:, None] | unused] = poison
    rows["row_weight"][unused.all(1)] = poison
    rows["teacher_ids"][rows["row_weight"] == 0] = 10**9
    dirty = with_triton(hidden, weight, rows, tail=tail)
    for name, value in clean.items():
        assert bool(torch.isfinite(value).all()) and torch.equal(dirty[name], value), name


@pytest.mark.parametrize("tail", [True, False])
def test_strided_inputs_and_no_gradient(tail: bool) -> None:
    hidden, weight, rows = make(9, 8, 30, 4)
    wide = hidden.repeat_interleave(2, 1), weight.repeat_interleave(2, 1)
    spaced = {name: value.repeat_interleave(2, -1)[..., ::2] for name, value in rows.items()}
    mine = with_gradients(
        lambda h, w: linear_distill(h[:, ::2], w[:, 1::2], **spaced, tail=tail, backend="triton")._asdict(), *wide
    )
    truth = exact(hidden, weight, rows, tail=tail)
    torch.testing.assert_close(mine["hidden"][:, ::2], truth.pop("hidden"))
    torch.testing.assert_close(mine["weight"][:, 1::2], truth.pop("weight"))
    assert_close(mine, truth, 1e-12)
    silent = linear_distill(hidden, weight, **rows, tail=tail, backend="triton")._asdict()
    assert_close(silent, truth, 1e-12)


def test_too_many_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_SLOTS", 3)
    hidden, weight, rows = make(2, 3, 9, 4)
    with pytest.raises(BackendError, match="K <= 3"):
        linear_distill(hidden, weight, **rows, backend="triton")

"""The Triton policy_loss_head against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r4b_kernels import head_chunks, linear_logprob
from r4b_kernels.head_chunks import RowSubset
from r4b_kernels.linear_logprob import triton as head
from r4b_kernels.policy_loss_head import reference
from r4b_kernels.policy_loss_head import triton as backend
from r4b_kernels.vocabulary import RowStatistics
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients
from tests.kernels.test_policy_loss_head import formula, make, ours

SHAPES = [(1, 1, 2), (5, 4, 1), (7, 5, 16), (37, 11, 53)]
ONE = [torch.tensor(1.0)]


def triton(rows: dict, temperature: float = 1.0, kl_coef: float = 0.05) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, w: ours(h, w, rows, temperature, kl_coef, "triton").loss


def doubled(rows: dict) -> dict:
    return {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and several blocks of columns, with ragged last ones, at sizes a test can afford."""
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 10)
    monkeypatch.setattr(head, "BLOCK", 16)
    monkeypatch.setattr(backend, "ROWS", 8)


@pytest.mark.parametrize(("shape", "kl_coef"), [*((shape, 0.05) for shape in SHAPES), (SHAPES[-1], 0.0)], ids=str)
def test_float64_is_the_formula(shape, kl_coef: float, small_blocks, same_in_any_order) -> None:
    hidden, weight, rows = make(*shape)
    seed = [torch.tensor(-2.5, dtype=torch.float64)]
    mine = same_in_any_order(lambda: results_and_gradients(triton(rows, 0.6, kl_coef), (hidden, weight), seed))
    exact = results_and_gradients(lambda h, w: formula(h, w, rows, 0.6, kl_coef), (hidden, weight), seed)
    assert_close(mine, exact, 1e-12)


def test_without_a_reference_policy() -> None:
    hidden, weight, rows = make(13, 5, 20)
    del rows["ref_logprob"]
    mine = results_and_gradients(triton(rows, kl_coef=0.0), (hidden, weight), ONE)
    filled = rows | {"ref_logprob": torch.zeros(13)}
    assert_close(
        mine, results_and_gradients(lambda h, w: formula(h, w, filled, 1.0, 0.0), (hidden, weight), ONE), 1e-12
    )


def test_metrics() -> None:
    hidden, weight, rows = make(37, 11, 53)
    mine = ours(hidden.requires_grad_(), weight, rows, 0.8, 0.1, "triton")
    exact = ours(hidden, weight, rows, 0.8, 0.1, "reference")
    for name, value in exact._asdict().items():
        torch.testing.assert_close(
            getattr(mine, name), value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    positive, plain = rows["advantage"] > 0, ~mine.clipped
    for branch in (positive & mine.clipped, ~positive & mine.clipped, positive & plain, ~positive & plain):
        assert branch.any()
    assert [value.requires_grad for value in mine] == [True] + [False] * 5


def test_kl_of_close_policies_keeps_its_digits() -> None:
    """Log-probabilities 0.01 apart: in float32, exp(gap) - 1 - gap as it stands would be off by a thousandth."""
    hidden, weight, rows = make(20, 4, 7, torch.float32)
    rows["target"].clamp_(min=0)
    rows["row_weight"].fill_(1.0)
    rows["ref_logprob"] = ours(hidden, weight, rows, 1.0, 0.1, "triton").logprob + 0.01 * torch.randn(20)
    result = ours(hidden, weight, rows, 1.0, 0.1, "triton")
    gap = (rows["ref_logprob"] - result.logprob).double()
    torch.testing.assert_close(result.kl.double(), torch.expm1(gap) - gap, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(dtype: torch.dtype) -> None:
    """float32 to six digits, halves no worse than torch; old log-probabilities where rounding flips no branch."""
    hidden, weight, rows = make(64, 64, 1000, dtype)
    rows["old_logprob"] = linear_logprob(hidden.double(), weight.double(), rows["target"], backend="cpu")[0].float()

    def torch_own(h: Tensor, w: Tensor) -> Tensor:
        log_p = F.linear(h, w).float().log_softmax(-1)
        logprob = log_p.gather(1, rows["target"].clamp_min(0)[:, None]).squeeze(1)
        objective = reference.Objective(0.2, 0.28, 0.05, 1.0)
        return reference.row_terms(logprob, reference.Rows(*rows.values()), objective).loss.sum()

    mine = results_and_gradients(triton(rows), (hidden, weight), ONE)
    double = hidden.double(), weight.double()
    exact = results_and_gradients(lambda h, w: formula(h, w, doubled(rows), 1.0, 0.05), double, ONE)
    if dtype == torch.float32:
        assert_close(mine, exact, 2e-6)
        return
    rival = results_and_gradients(torch_own, (hidden, weight), ONE)
    for name in ("gradient 0", "gradient 1"):
        assert_no_worse({name: mine[name]}, {name: rival[name]}, {name: exact[name]})
    assert abs(mine["output 0"] - exact["output 0"]) < 1e-4 * rows["row_weight"].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaked_rows(dtype: torch.dtype, small_blocks) -> None:
    """Logits of 80: probabilities near 0 and near 1, targets at the peak and away from it."""
    hidden, weight, rows = make(24, 16, 60, dtype)
    scale = 80.0 / (hidden.float() @ weight.float().T).amax(-1, keepdim=True)
    hidden = (hidden * scale).to(dtype)
    rows["target"][::2] = (hidden @ weight.T).argmax(-1)[::2]
    rows["old_logprob"] = linear_logprob(hidden.double(), weight.double(), rows["target"], backend="cpu")[0].float()
    rows["ref_logprob"] = rows["old_logprob"] + 0.3
    mine = results_and_gradients(triton(rows), (hidden, weight), ONE)
    double = hidden.double(), weight.double()
    exact = results_and_gradients(lambda h, w: formula(h, w, doubled(rows), 1.0, 0.05), double, ONE)
    assert_close(mine, exact, 5e-5 if dtype == torch.float32 else 1e-2)
    logprob = ours(hidden, weight, rows, 1.0, 0.05, "triton").logprob
    live = rows["target"] >= 0
    assert (logprob - linear_logprob(*double, rows["target"], backend="reference")[0])[live].abs().max() < 1e-3


def test_gradcheck() -> None:
    hidden, weight, rows = make(9, 4, 7)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(triton(rows, 0.7, 0.1), leaves, fast_mode=True)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_without_a_loss_may_hold_anything(poison: float) -> None:
    hidden, weight, rows = make(37, 11, 53)
    clean = results_and_gradients(triton(rows), (hidden, weight), ONE)
    masked = rows["target"] < 0
    for name in ("old_logprob", "advantage", "ref_logprob"):
        rows[name][masked | (rows["row_weight"] == 0)] = poison
    rows["row_weight"][masked] = poison
    hidden[masked] = poison
    dirty = results_and_gradients(triton(rows), (hidden, weight), ONE)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name
    for name, value in ours(hidden, weight, rows, 1.0, 0.1, "triton")._asdict().items():
        assert bool(torch.isfinite(value).all()), name


def test_bad_values_in_rows_with_a_loss_are_loud() -> None:
    for name, value in (("old_logprob", torch.nan), ("advantage", torch.nan), ("target", 2**40)):
        hidden, weight, rows = make(8, 4, 7)
        rows[name][0] = value
        mine = results_and_gradients(triton(rows), (hidden, weight), ONE)
        assert bool(mine["output 0"].isnan()) and bool(mine["gradient 0"][0].isnan().all()), name


def test_far_apart_policies_stay_finite() -> None:
    """Log-differences of 500: finite loss, and no gradient beyond the clamp."""
    hidden, weight, rows = make(12, 4, 7, torch.float32)
    rows["row_weight"].fill_(1.0)
    rows["target"].clamp_(min=0)
    rows |= {"old_logprob": torch.full((12,), -500.0), "ref_logprob": torch.full((12,), 500.0)}
    mine = results_and_gradients(triton(rows, 1.0, 0.1), (hidden, weight), ONE)
    assert bool(torch.isfinite(mine["output 0"])) and not mine["gradient 0"].any() and not mine["gradient 1"].any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_row(tokens: int) -> None:
    hidden, weight, rows = make(tokens, 4, 7)
    rows["row_weight"].zero_()
    for name, value in results_and_gradients(triton(rows), (hidden, weight), ONE).items():
        assert not value.any(), name


def test_dead_rows_take_no_backward_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows known to have no gradient never reach the accumulator, and rows are counted in one wait for the device."""
    hidden, weight, rows = make(64, 8, 20)
    seen, add = [], head_chunks.GradientAccumulator.add
    monkeypatch.setattr(
        head_chunks.GradientAccumulator, "add", lambda self, index, *rest: (seen.append(index), add(self, index, *rest))
    )
    ours(hidden.requires_grad_(), weight, rows, 1.0, 0.0, "triton")
    live = (rows["target"] >= 0) & (rows["row_weight"] != 0) & (rows["advantage"] != 0)
    assert torch.equal(torch.cat(seen), live.nonzero().squeeze(1)) and not live.all()
    with torch.no_grad():
        ours(hidden, weight, rows, 1.0, 0.0, "triton")
    assert len(seen) == 1


def test_a_shard_far_below_the_others_keeps_its_target() -> None:
    """The maximum of the whole vocabulary 90 above this shard's: no overflow, and the target pulls with full force."""
    z = torch.randn(3, 20)
    powers = torch.empty_like(z)
    target = torch.tensor([4, 30, 7])
    rows = reference.Rows(target, torch.zeros(3), torch.ones(3), torch.full((3,), 0.5), None)
    local, offset = head.reduce_rows(z, target, 0, 40, powers)
    whole = RowStatistics(local.maximum + 90.0, torch.full((3,), 7.0), torch.zeros(3), local.target)
    rows = rows._replace(old_logprob=whole.logprob)
    objective = reference.Objective(0.2, 0.2, 0.0, 1.0)
    metrics, everything = backend.Metrics(rows, torch.float32), RowSubset(None, 3)
    scale = metrics.score(everything, slice(0, 3), whole, objective, (powers, offset), 0)
    expected = torch.zeros(3, 20)
    expected[0, 4] = expected[2, 7] = -0.5
    torch.testing.assert_close(powers * scale[:, None], expected, rtol=1e-6, atol=1e-9)


def test_the_vocabulary_of_qwen() -> None:
    hidden, weight, rows = make(3, 16, 151936, torch.float32)
    rows["target"] = torch.tensor([151935, 0, -1])
    rows["advantage"], rows["row_weight"] = torch.tensor([1.0, -1.0, 1.0]), torch.ones(3)
    rows["old_logprob"] = rows["ref_logprob"] = torch.full((3,), -12.0)
    mine = results_and_gradients(triton(rows), (hidden, weight), ONE)
    double = hidden.double(), weight.double()
    exact = results_and_gradients(lambda h, w: formula(h, w, doubled(rows), 1.0, 0.05), double, ONE)
    assert_close(mine, exact, 5e-6)


def test_operator_contract_compilation_and_checkpointing() -> None:
    hidden, weight, rows = make(7, 4, 6)
    rows["advantage"] = -rows["advantage"].abs()  # see the test of the same name for the other backends
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    scalars = (0.2, 0.3, 0.1, 0.7, None, True, True, "triton")
    torch.library.opcheck(torch.ops.r4b_kernels.policy_loss_head.default, (*leaves, *rows.values(), *scalars))
    plain = results_and_gradients(triton(rows), (hidden, weight), ONE)
    compiled = torch.compile(triton(rows), backend="aot_eager", fullgraph=True)
    again = lambda h, w: checkpoint(triton(rows), h, w, use_reentrant=False)  # noqa: E731
    for function in (compiled, again):
        for name, value in results_and_gradients(function, (hidden, weight), ONE).items():
            assert torch.equal(value, plain[name]), name

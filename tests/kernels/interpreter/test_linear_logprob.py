"""The Triton linear_logprob against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r4b_kernels import head_chunks, linear_logprob
from r4b_kernels.head_chunks import narrow_view
from r4b_kernels.linear_logprob import triton as backend
from tests.kernels.head_cases import assert_close, assert_no_worse, relative, results_and_gradients
from tests.kernels.test_linear_logprob import dense, make, torch_own

SHAPES = [(1, 1, 1), (7, 5, 3), (13, 6, 16), (23, 11, 53), (14, 16, 128)]


def triton(target: Tensor, temperature: float = 1.0) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda h, w: linear_logprob(h, w, target, temperature=temperature, backend="triton")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and several blocks of columns, with ragged last ones, at sizes a test can afford."""
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 10)
    monkeypatch.setattr(backend, "BLOCK", 16)


@pytest.mark.parametrize(("shape", "temperature"), [*((shape, 0.6) for shape in SHAPES), (SHAPES[-2], 1.0)], ids=str)
def test_float64_is_the_definition(shape, temperature: float, small_blocks, same_in_any_order) -> None:
    hidden, weight, target, seeds = make(*shape)
    ours = same_in_any_order(lambda: results_and_gradients(triton(target, temperature), (hidden, weight), seeds))
    exact = results_and_gradients(lambda h, w: dense(h, w, target, temperature), (hidden, weight), seeds)
    assert_close(ours, exact, 1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result_alone(used: int) -> None:
    hidden, weight, target, seeds = make(17, 6, 53)
    ours = results_and_gradients(lambda h, w: triton(target)(h, w)[used], (hidden, weight), seeds[used:][:1])
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0)[used], (hidden, weight), seeds[used:][:1])
    assert_close(ours, exact, 1e-12)


def test_float32_is_accurate() -> None:
    hidden, weight, target, seeds = make(30, 64, 1000, torch.float32)
    ours = results_and_gradients(triton(target), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    assert_close(ours, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    hidden, weight, target, seeds = make(64, 64, 1000, dtype)
    ours = results_and_gradients(triton(target), (hidden, weight), seeds)
    rival = results_and_gradients(lambda h, w: torch_own(h, w, target, 1.0), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    assert_no_worse(ours, rival, exact)
    assert ours["output 0"].dtype == torch.float32 and ours["gradient 0"].dtype == dtype


def test_gradcheck() -> None:
    hidden, weight, target, _ = make(9, 4, 7)
    assert torch.autograd.gradcheck(
        triton(target, 0.7), (hidden.requires_grad_(), weight.requires_grad_()), fast_mode=True
    )


def test_peaked_rows_in_bfloat16_keep_three_digits() -> None:
    """Logits up to 80: rounded to bfloat16 they would be off by up to 0.25; nothing is."""
    hidden, weight, target, _ = make(40, 32, 300, torch.bfloat16, masked=False)
    hidden *= 80.0 / (hidden @ weight.T).amax(-1, keepdim=True)
    exact, entropy = dense(hidden.double(), weight.double(), target, 1.0)
    ours = triton(target)(hidden, weight)
    assert exact.min() < -60
    assert (ours[0] - exact).abs().max() < 1e-3 and (ours[1] - entropy).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_offset_moves_where_a_later_block_is_far_higher(dtype: torch.dtype, small_blocks) -> None:
    """Rows that rise by hundreds or by just enough from block to block, that fall, that peak; in place."""
    columns = 16 * 5 + 3
    rise = torch.arange(columns).double() // 16 * 170.0
    peak = torch.zeros(columns).double()
    peak[40] = 90.0
    z = torch.stack([rise, rise.flip(0), peak, 0.1 * rise, -peak]) + 0.1 * torch.randn(5, columns).double()
    target = torch.tensor([columns - 1, columns - 1, 3, 3, 2**40])
    wide = z.to(torch.float64 if dtype == torch.float64 else torch.float32)
    statistics, offset = backend.reduce_rows(buffer := wide.clone(), target, 0, columns, narrow_view(buffer, dtype))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    exact = wide.double()
    assert relative(statistics.logsumexp, exact.logsumexp(-1)) < tolerance
    assert torch.equal(statistics.maximum, wide.amax(-1))
    log_p = exact.log_softmax(-1)
    assert relative(statistics.logprob[:4], log_p[range(4), target[:4]]) < tolerance
    assert bool(statistics.logprob[4].isnan())
    torch.testing.assert_close(statistics.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=tolerance, atol=1e-12)
    plain, _ = backend.reduce_rows(wide, target, 0, columns)
    for name, value, alone in zip(statistics._fields, statistics, plain, strict=True):
        assert torch.equal(value.nan_to_num(), alone.nan_to_num()), name
    assert bool((statistics.maximum - offset <= backend.SLACK).all()) and bool((offset <= statistics.maximum).all())
    powers = narrow_view(buffer, dtype).double()
    p = powers * torch.exp(offset.double() - exact.logsumexp(-1))[:, None]
    step = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(p, exact.softmax(-1), rtol=step, atol=1e-16)


def test_masked_rows_may_hold_anything() -> None:
    hidden, weight, target, seeds = make(20, 6, 9)
    masked = target < 0
    hidden[masked] = torch.nan
    ours = results_and_gradients(triton(target), (hidden, weight), seeds)
    assert bool(masked.any()) and not ours["output 0"][masked].any() and not ours["output 1"][masked].any()
    kept = ~masked
    alone = results_and_gradients(triton(target[kept]), (hidden[kept], weight), [s[kept] for s in seeds])
    assert not ours["gradient 0"][masked].any() and torch.equal(ours["gradient 0"][kept], alone["gradient 0"])
    assert torch.equal(ours["gradient 1"], alone["gradient 1"])


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_row(tokens: int) -> None:
    hidden, weight, target, seeds = make(tokens, 6, 9)
    target = torch.full_like(target, -1)
    for name, value in results_and_gradients(triton(target), (hidden, weight), seeds).items():
        assert not value.any(), name


def test_a_target_beyond_the_vocabulary_is_loud_and_safe() -> None:
    hidden, weight, target, seeds = make(6, 4, 9, masked=False)
    target[2], target[4] = 9, 2**62
    ours = results_and_gradients(triton(target), (hidden, weight), seeds)
    bad = torch.tensor([False, False, True, False, True, False])
    assert torch.equal(ours["output 0"].isnan(), bad) and torch.equal(ours["gradient 0"].isnan().all(-1), bad)
    assert bool(ours["gradient 1"].isnan().all())


def test_the_vocabulary_of_qwen() -> None:
    """151936 is no multiple of a block: the ragged end must carry no phantom probability."""
    hidden, weight, target, seeds = make(3, 16, 151936, torch.float32, masked=False)
    target[0] = 151935
    ours = results_and_gradients(triton(target), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    rival = results_and_gradients(lambda h, w: torch_own(h, w, target, 1.0), (hidden, weight), seeds)
    # One float32 product over 151936 terms carries most of the error of hidden's gradient, in torch as here.
    assert_no_worse({"": ours.pop("gradient 0")}, {"": rival["gradient 0"]}, {"": exact.pop("gradient 0")})
    assert_close(ours, exact, 2e-6)


def test_strided_inputs() -> None:
    hidden, weight, target, seeds = make(12, 8, 10)
    wide, tall = torch.randn(12, 16, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
    wide[:, ::2], tall.T[:] = hidden, weight
    twice = target.repeat_interleave(2)
    ours = results_and_gradients(lambda h, w: triton(twice[::2])(h[:, ::2], w.T), (wide, tall), seeds)
    exact = results_and_gradients(lambda h, w: dense(h[:, ::2], w.T, target, 1.0), (wide, tall), seeds)
    assert_close(ours, exact, 1e-12)


def test_operator_contract_compilation_and_checkpointing() -> None:
    hidden, weight, target, seeds = make(5, 4, 6)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(torch.ops.r4b_kernels.linear_logprob.default, (*leaves, target, 0.7, None, "triton"))
    plain = results_and_gradients(triton(target), (hidden, weight), seeds)
    compiled = torch.compile(triton(target), backend="aot_eager", fullgraph=True)
    again = lambda h, w: checkpoint(triton(target), h, w, use_reentrant=False)  # noqa: E731
    for function in (compiled, again):
        for name, value in results_and_gradients(function, (hidden, weight), seeds).items():
            assert torch.equal(value, plain[name]), name

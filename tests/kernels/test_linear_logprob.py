"""linear_logprob against its dense definition, against other people's code, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import head_chunks, linear_logprob
from r4b_kernels.linear_logprob import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, relative, results_and_gradients

BACKENDS = ["cpu", "reference"]
SHAPES = [(1, 1, 1), (1, 3, 2), (7, 5, 3), (37, 11, 53), (64, 16, 64), (129, 33, 257), (200, 24, 1001)]


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, masked: bool = True):
    hidden = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(vocabulary, width, dtype=dtype) / width**0.5
    target = torch.randint(vocabulary, (tokens,))
    if masked:
        target[tokens // 3 :: 4] = -100
    return hidden, weight, target, (torch.randn(tokens, dtype=torch.float64), torch.randn(tokens, dtype=torch.float64))


def dense(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return reference.logprob_and_entropy(reference.logits(hidden, weight, temperature), target)


def torch_own(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What one writes in torch: the product in the input's dtype, the softmax in float32."""
    logits = F.linear(hidden, weight).float() / temperature
    return reference.logprob_and_entropy(logits, target)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks with a ragged last one, at sizes a test can afford."""
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_definition(shape, temperature: float, backend: str, small_chunks) -> None:
    hidden, weight, target, seeds = make(*shape)
    ours = results_and_gradients(
        lambda h, w: linear_logprob(h, w, target, temperature=temperature, backend=backend), (hidden, weight), seeds
    )
    exact = results_and_gradients(lambda h, w: dense(h, w, target, temperature), (hidden, weight), seeds)
    assert_close(ours, exact, 1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result_alone(used: int) -> None:
    hidden, weight, target, seeds = make(37, 11, 53)
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target)[used], (hidden, weight), seeds[used:][:1])
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0)[used], (hidden, weight), seeds[used:][:1])
    assert_close(ours, exact, 1e-12)


def test_float32_is_accurate() -> None:
    hidden, weight, target, seeds = make(150, 64, 1000, torch.float32)
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    assert_close(ours, exact, 2e-6)
    assert ours["output 0"].dtype == ours["gradient 1"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_no_worse_than_torch(backend: str) -> None:
    hidden, weight, target, seeds = make(192, 64, 1000, torch.bfloat16)
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target, backend=backend), (hidden, weight), seeds)
    rival = results_and_gradients(lambda h, w: torch_own(h, w, target, 1.0), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    assert_no_worse(ours, rival, exact)
    assert ours["output 0"].dtype == torch.float32 and ours["gradient 0"].dtype == torch.bfloat16


def test_gradcheck() -> None:
    hidden, weight, target, _ = make(9, 4, 7)
    hidden.requires_grad_()
    weight.requires_grad_()
    function = lambda h, w: linear_logprob(h, w, target, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend: str) -> None:
    hidden, weight, target, seeds = make(20, 6, 9)
    masked = target < 0
    hidden[masked] = torch.nan
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target, backend=backend), (hidden, weight), seeds)
    assert bool(masked.any()) and not ours["output 0"][masked].any() and not ours["output 1"][masked].any()
    assert not ours["gradient 0"][masked].any()
    kept = ~masked
    alone = results_and_gradients(
        lambda h, w: linear_logprob(h, w, target[kept], backend=backend),
        (hidden[kept], weight),
        [s[kept] for s in seeds],
    )
    torch.testing.assert_close(ours["gradient 1"], alone["gradient 1"])
    torch.testing.assert_close(ours["gradient 0"][kept], alone["gradient 0"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_row(tokens: int, backend: str) -> None:
    hidden, weight, target, seeds = make(tokens, 6, 9)
    target = torch.full_like(target, -1)
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target, backend=backend), (hidden, weight), seeds)
    for name, value in ours.items():
        assert not value.any(), name
    assert ours["gradient 1"].shape == weight.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_in_bfloat16_keep_three_digits(backend: str) -> None:
    """Logits up to 80: rounded to bfloat16 they would be off by up to 0.25; nothing is."""
    hidden, weight, target, _ = make(40, 32, 300, torch.bfloat16, masked=False)
    hidden *= 80.0 / (hidden @ weight.T).amax(-1, keepdim=True)
    exact, entropy = dense(hidden.double(), weight.double(), target, 1.0)
    ours = linear_logprob(hidden, weight, target, backend=backend)
    assert exact.min() < -60
    assert (ours[0] - exact).abs().max() < 1e-3 and (ours[1] - entropy).abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_keep_their_precision(backend: str) -> None:
    """Logits of +-1000: the log-probability of the peak is 0, of others -2000, and nothing overflows."""
    hidden = torch.tensor([[1000.0], [1000.0]])
    weight = torch.tensor([[1.0], [-1.0], [-1.0]])
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1]), backend=backend)
    assert logprob.tolist() == [0.0, -2000.0] and entropy.tolist() == [0.0, 0.0]


def test_the_vocabulary_of_qwen() -> None:
    """151936 is no multiple of 256 or 1024: the ragged end must carry no phantom probability."""
    hidden, weight, target, seeds = make(3, 4, 151936, torch.float32, masked=False)
    target[0] = 151935
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target), (hidden, weight), seeds)
    exact = results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden.double(), weight.double()), seeds)
    rival = results_and_gradients(lambda h, w: torch_own(h, w, target, 1.0), (hidden, weight), seeds)
    # One float32 product over 151936 terms carries most of the error of hidden's gradient, in torch as here.
    assert_no_worse({"": ours.pop("gradient 0")}, {"": rival["gradient 0"]}, {"": exact.pop("gradient 0")})
    assert_close(ours, exact, 2e-6)


def test_chunks_do_not_change_a_row(small_chunks) -> None:
    hidden, weight, target, _ = make(64, 16, 64)
    whole = linear_logprob(hidden, weight, target)
    part = linear_logprob(hidden[20:30], weight, target[20:30])
    assert relative(whole[0][20:30], part[0]) < 1e-14 and relative(whole[1][20:30], part[1]) < 1e-14


def test_runs_repeat_bit_by_bit() -> None:
    hidden, weight, target, seeds = make(300, 32, 1001, torch.float32)
    runs = [results_and_gradients(lambda h, w: linear_logprob(h, w, target), (hidden, weight), seeds) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, target, _ = make(8, 4, 6)
    weight.requires_grad_()
    linear_logprob(hidden, weight, target)[0].sum().backward()
    assert hidden.grad is None and weight.grad is not None
    exact = weight.detach().clone().requires_grad_()
    dense(hidden, exact, target, 1.0)[0].sum().backward()
    torch.testing.assert_close(weight.grad, exact.grad)


def test_noncontiguous_inputs() -> None:
    hidden, weight, target, seeds = make(12, 8, 10)
    wide, tall = torch.randn(12, 16, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
    wide[:, ::2], tall.T[:] = hidden, weight
    ours = results_and_gradients(lambda h, w: linear_logprob(h[:, ::2], w.T, target), (wide, tall), seeds)
    exact = results_and_gradients(lambda h, w: dense(h[:, ::2], w.T, target, 1.0), (wide, tall), seeds)
    assert_close(ours, exact, 1e-12)


def test_operator_contract() -> None:
    hidden, weight, target, _ = make(5, 4, 6)
    for backend in (None, "reference"):
        for differentiable in (False, True):
            arguments = hidden.requires_grad_(differentiable), weight.requires_grad_(differentiable)
            torch.library.opcheck(
                torch.ops.r4b_kernels.linear_logprob.default, (*arguments, target, 0.7, None, backend)
            )


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, target, seeds = make(12, 8, 10)
    compiled = torch.compile(lambda h, w: linear_logprob(h, w, target), backend="aot_eager", fullgraph=True)
    ours = results_and_gradients(compiled, (hidden, weight), seeds)
    assert_close(ours, results_and_gradients(lambda h, w: dense(h, w, target, 1.0), (hidden, weight), seeds), 1e-12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": torch.randn(4)}, "hidden"),
        ({"weight": torch.randn(5, 2)}, "weight"),
        ({"weight": torch.randn(5, 3, dtype=torch.float64)}, "weight"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "target"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target"),
        ({"target": torch.tensor([0, 1, 5, 2])}, "target has the id 5"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"temperature": 0.0}, "temperature"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_errors_name_the_argument(change: dict, named: str) -> None:
    arguments = {"hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "target": torch.zeros(4, dtype=torch.int64)}
    arguments |= change
    with pytest.raises(ValueError, match=named):
        linear_logprob(**arguments)


def test_agrees_with_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is an oracle, not a dependency")
    hidden, weight, target, seeds = make(40, 16, 129, torch.float32, masked=False)

    def theirs(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.T / 0.7
        return utils.selective_log_softmax(logits, target), utils.entropy_from_logits(logits)

    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target, temperature=0.7), (hidden, weight), seeds)
    assert_close(ours, results_and_gradients(theirs, (hidden, weight), seeds), 5e-6)


def test_agrees_with_the_chunked_function_of_trl() -> None:
    """Gradients through the log-probability and the entropy at once, chunks that do not divide the vocabulary."""
    chunked = pytest.importorskip("trl.kernels", reason="TRL is an oracle, not a dependency").ChunkedLogProbFunction
    hidden, weight, target, seeds = make(40, 16, 129, torch.float32, masked=False)
    theirs = lambda h, w: chunked.apply(h, w, None, target, 0.7, 50, None, 1.0, ("entropy",))[:2]  # noqa: E731
    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target, temperature=0.7), (hidden, weight), seeds)
    assert_close(ours, results_and_gradients(theirs, (hidden, weight), seeds), 5e-6)


def test_agrees_with_cut_cross_entropy() -> None:
    cce = pytest.importorskip("cut_cross_entropy", reason="CCE is an oracle, not a dependency")
    hidden, weight, target, seeds = make(40, 16, 129, torch.float32)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        return -cce.linear_cross_entropy(h, w, target, impl="torch_compile", reduction="none", ignore_index=-100)

    ours = results_and_gradients(lambda h, w: linear_logprob(h, w, target)[0], (hidden, weight), seeds[:1])
    with torch.compiler.set_stance("force_eager"):
        assert_close(ours, results_and_gradients(theirs, (hidden, weight), seeds[:1]), 5e-6)

"""The Triton draw_tokens against its definition, in blocks of 16 and of a GPU's size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r4b_kernels import draw_tokens
from r4b_kernels.draw_tokens import triton as implementation

NEVER = -float("inf")
SHAPES = [(1, 1), (4, 5), (4, 33), (5, 64)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "BLOCK", 16)


def points(rows: int) -> Tensor:
    """Evenly over [0, 1), off the edges between tokens."""
    return (torch.arange(rows, dtype=torch.float64) + 0.4142) / rows


def named(*arguments: object, **options: object) -> dict[str, Tensor]:
    return dict(zip(("token", "logprob", "entropy"), draw_tokens(*arguments, **options), strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.0, 1.0), (1.3, 0.9), (0.7, 0.3)])
def test_against_the_definition(
    temperature: float, top_p: float, small_blocks: None, same_in_any_order: Callable
) -> None:
    for rows, count in SHAPES:
        logits = (3 * torch.randn(rows, count)).double()
        logits[0, count // 2 :] = NEVER if count > 1 else 0.0
        forced = torch.full((rows,), -1)
        forced[rows // 2] = count - 1
        options = {"temperature": temperature, "top_p": top_p}
        exact = named(logits, points(rows), forced, **options, backend="reference")
        single = named(logits.float(), points(rows), forced, **options, backend="triton")
        assert torch.equal(single["token"], exact["token"])
        double = single
        if top_p == 1:
            double = same_in_any_order(lambda: named(logits, points(rows), forced, **options, backend="triton"))  # noqa: B023
            assert torch.equal(double["token"], exact["token"])
        for name in ("logprob", "entropy"):
            assert single[name].dtype == torch.float32
            torch.testing.assert_close(single[name].double(), exact[name], rtol=2e-6, atol=2e-6)
            if top_p == 1:
                torch.testing.assert_close(double[name], exact[name], rtol=1e-12, atol=1e-12)


def test_a_nucleus_in_float64_whatever_the_order(small_blocks: None, same_in_any_order: Callable) -> None:
    logits, point = torch.randn(2, 40).double(), points(2)
    got = same_in_any_order(lambda: named(logits, point, top_p=0.8, backend="triton"))
    assert torch.equal(got["token"], named(logits, point, top_p=0.8, backend="reference")["token"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, small_blocks: None) -> None:
    logits = (2 * torch.randn(6, 50)).to(dtype)
    got, exact = (named(logits, points(6), backend=backend) for backend in ("triton", "reference"))
    assert torch.equal(got["token"], exact["token"])
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(got[name], exact[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.65, 0.75, 1e-6])
def test_evenly_spaced_points_draw_every_token_in_its_proportion(top_p: float) -> None:
    probability = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    kept = {1.0: [0, 1, 2, 3, 4], 0.65: [1, 3], 0.75: [1, 3, 4], 1e-6: [1]}[top_p]
    rows = 100 if top_p == 1 else 14
    token, logprob, _ = draw_tokens(
        probability.log().float().expand(rows, -1), points(rows), top_p=top_p, backend="triton"
    )
    share = torch.zeros_like(probability).index_copy(0, torch.tensor(kept), probability[kept])
    counts = torch.bincount(token, minlength=5)
    assert float((counts - rows * share / share.sum()).abs().max()) <= 1
    torch.testing.assert_close(logprob.double(), probability.log()[token])
    assert (token.diff() >= 0).all(), "the order of the vocabulary"


def test_rounding_moves_an_edge_between_tokens_by_less_than_a_millionth() -> None:
    """At points right at the edges: the token is one whose share of the exact CDF lies that near."""
    rows, count = 24, 5000
    logits = 2 * torch.randn(count)
    exact = logits.double().softmax(0)
    cdf = exact.cumsum(0)
    point = cdf[torch.randint(count - 1, (rows,))] + 1e-9 * torch.randn(rows, dtype=torch.float64)
    token, _, _ = draw_tokens(logits.expand(rows, -1), point, backend="triton")
    assert (point <= cdf[token] + 1e-6).all() and (point >= cdf[token] - exact[token] - 1e-6).all()


def test_edges() -> None:
    logits = torch.tensor([NEVER, 0.0, NEVER, 3.0, NEVER]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, _, entropy = draw_tokens(logits, edges, backend="triton")
    assert token.tolist() == [1, 3] and entropy.isfinite().all()
    assert draw_tokens(logits, edges, top_p=0.5, backend="triton")[0].tolist() == [3, 3]
    assert draw_tokens(logits, edges, top_p=1 - 2**-53, backend="triton")[0].tolist() == [1, 3]
    # Equal logits: the first of them is the most probable one.
    equal = torch.zeros(2, 21)
    assert draw_tokens(equal, edges, temperature=0.0, backend="triton")[0].tolist() == [0, 0]
    assert draw_tokens(equal, edges, top_p=0.1, backend="triton")[0].tolist() == [0, 2]
    token, logprob, _ = draw_tokens(
        torch.tensor([[0.0, NEVER], [200.0, -200.0]]), edges, torch.tensor([1, 1]), backend="triton"
    )
    assert token.tolist() == [1, 1] and logprob.tolist() == [NEVER, -400.0]
    assert draw_tokens(torch.zeros(0, 3), torch.zeros(0, dtype=torch.float64), backend="triton")[0].shape == (0,)


def test_a_point_at_an_edge_is_the_token_behind_it(small_blocks: None) -> None:
    """Weights of 1 have exact sums: of 32 tokens in two blocks, k / 32 is token k."""
    logits, point = torch.zeros(5, 32), torch.tensor([0, 1, 15, 16, 31], dtype=torch.float64) / 32
    assert draw_tokens(logits, point, backend="triton")[0].tolist() == [0, 1, 15, 16, 31]
    # Half of them are the nucleus, all in the first block.
    assert draw_tokens(logits[:2], point[1:3], top_p=0.5, backend="triton")[0].tolist() == [0, 7]


def test_ties_and_gaps_across_blocks(small_blocks: None) -> None:
    """Ties of a nucleus' edge in three blocks, blocks of nothing, and one that is nothing beside the others."""
    logits = torch.full((4, 80), NEVER)
    logits[:, [3, 17, 18, 40, 70]] = 0.0
    logits[:, 41] = 1.0
    logits[:, 60] = -150.0
    for top_p in (1.0, 0.6, 0.4):
        got, exact = (
            draw_tokens(logits, points(4), top_p=top_p, backend=backend)[0] for backend in ("triton", "reference")
        )
        assert torch.equal(got, exact), top_p
    first = draw_tokens(logits[:, 48:], torch.zeros(4, dtype=torch.float64), backend="triton")[0]
    assert (first == 22).all(), "what is exp(-150) of the largest has no weight"


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice", "ignore:divide by zero")
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_what_is_no_number_gives_none_and_a_token_that_exists(options: dict[str, float]) -> None:
    logits = torch.tensor([[float("nan")] * 9, [0.0] * 4 + [float("nan")] + [1.0] * 4, [NEVER] * 9])
    token, logprob, entropy = draw_tokens(logits, points(3), **options, backend="triton")
    assert logprob.isnan().all() and entropy.isnan().all() and ((token >= 0) & (token < 9)).all()


def test_broken_numbers_are_not_a_number_and_stay_inside() -> None:
    """What the host cannot check on a GPU: the backend itself gets them, under checked bounds."""
    point = torch.tensor([1.0, -0.5, float("nan"), 0.5, 0.5, 0.5], dtype=torch.float64)
    forced = torch.tensor([-1, -1, -1, 5, -2, 4])
    for top_p in (1.0, 0.5):
        token, logprob, _ = implementation.Backend.forward(torch.randn(6, 5), point, forced, 1.0, top_p)
        assert logprob.isnan().tolist() == [True] * 5 + [False] and ((token >= 0) & (token < 5)).all()

"""Drawing: uniform numbers that are the same everywhere, seeds that do not meet, nuclei, and what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from r4b_core.rollout.sampling import draw, request_seed, uniform
from r4b_core.rollout.types import SamplingParams


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standard normal score of Pearson's statistic (Wilson-Hilferty)."""
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def in_plain_integers(seed: int, position: int) -> float:
    """What `uniform` computes, in Python's integers."""
    mask = 2**64 - 1
    x = (seed + position * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("along", ["seeds", "positions", "both"])
def test_uniform_is_uniform(along: str) -> None:
    n = 100_000
    seed = torch.tensor([request_seed(0, i) for i in range(n)]) if along != "positions" else torch.full((n,), 12345)
    position = torch.arange(n) % (40 if along == "both" else n) if along != "seeds" else torch.zeros(n).long()
    drawn = uniform(seed, position)
    assert drawn.dtype == torch.float64 and drawn.min() >= 0 and drawn.max() < 1
    assert abs(chi_square(torch.histc(drawn, 100, 0, 1), torch.full((100,), n / 100))) < 4
    # Neighbours do not follow one another: pairs fill the square evenly too.
    cells = (drawn[:-1] * 10).long() * 10 + (drawn[1:] * 10).long()
    assert abs(chi_square(torch.bincount(cells, minlength=100), torch.full((100,), (n - 1) / 100))) < 4


def test_uniform_is_the_same_on_every_machine() -> None:
    known = {  # seed 0: the published first outputs of SplitMix64
        (0, 1): 0xE220A8397B1DCDAF,
        (0, 2): 0x6E789E6AA1B965F4,
    }
    for (seed, position), bits in known.items():
        assert float(uniform(torch.tensor([seed]), torch.tensor([position]))) == (bits >> 11) / 2**53
    assert request_seed(1, 2, 3) == 7510213797696614745
    pairs = [(seed, position) for seed in (1, request_seed(1, 2, 3), 2**63 - 1) for position in (0, 7, 1000)]
    drawn = uniform(*(torch.tensor(column) for column in zip(*pairs, strict=True)))
    assert drawn.tolist() == [in_plain_integers(*pair) for pair in pairs]


def test_request_seeds_do_not_meet() -> None:
    parts = [(s, t, p, k) for s in range(3) for t in range(40) for p in range(40) for k in range(9)]
    seeds = {request_seed(*each) for each in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Neither the order nor the number of the parts is lost.
    assert len({request_seed(1, 2), request_seed(2, 1), request_seed(1, 2, 0), request_seed(0, 1, 2)}) == 4


def test_draws_follow_the_distribution() -> None:
    n = 20_000
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -4.0])
    seed = torch.tensor([request_seed(5, i) for i in range(n)])
    drawn = draw(logits.expand(n, -1).contiguous(), uniform(seed, torch.tensor(0)), None, 0.7, 1.0)
    probability = (logits / 0.7).softmax(-1)
    assert abs(chi_square(torch.bincount(drawn.token, minlength=5), n * probability)) < 4
    torch.testing.assert_close(drawn.logprob, probability.log()[drawn.token])
    torch.testing.assert_close(drawn.entropy, -(probability * probability.log()).sum().expand(n))


def test_top_p_keeps_the_nucleus_and_reports_the_full_distribution() -> None:
    n = 4_000
    probability = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    seed = torch.arange(n) * 7919
    # 0.4 + 0.3 reach 0.65; 0.75 takes one more; the first token stays however small the nucleus.
    for top_p, nucleus in ((0.65, {1, 3}), (0.75, {1, 3, 4}), (1e-6, {1}), (0.999, {0, 1, 2, 3, 4})):
        drawn = draw(probability.log().expand(n, -1).contiguous(), uniform(seed, torch.tensor(0)), None, 1.0, top_p)
        assert set(drawn.token.tolist()) == nucleus
        torch.testing.assert_close(drawn.logprob, probability.log()[drawn.token])
        inside = torch.tensor(sorted(nucleus))
        if len(inside) > 1:
            expected = n * probability[inside] / probability[inside].sum()
            assert abs(chi_square(torch.bincount(drawn.token, minlength=5)[inside], expected)) < 4


def test_greedy_and_forced_tokens() -> None:
    logits, point = torch.randn(6, 9), torch.rand(6, dtype=torch.float64)
    greedy = draw(logits, point, None, 0.0, 1.0)
    assert torch.equal(greedy.token, logits.argmax(-1))
    torch.testing.assert_close(greedy.logprob, logits.log_softmax(-1).amax(-1))
    forced = torch.full((6,), -1)
    forced[2] = 8
    drawn = draw(logits, point, forced, 1.0, 1.0)
    others = draw(logits, point, None, 1.0, 1.0)
    assert drawn.token[2] == 8
    assert torch.equal(drawn.token[[0, 1, 3, 4, 5]], others.token[[0, 1, 3, 4, 5]])
    torch.testing.assert_close(drawn.logprob[2], logits[2].log_softmax(-1)[8])


def test_an_impossible_token_is_never_drawn_at_the_edges_of_the_cdf() -> None:
    logits = torch.tensor([-float("inf"), 0.0, -float("inf"), 3.0, -float("inf")])
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p, last in ((1.0, 3), (0.99, 3)):
        drawn = draw(logits.expand(2, -1).contiguous(), edges, None, 1.0, top_p)
        assert drawn.token.tolist() == [1, last]
    assert draw(logits.expand(2, -1).contiguous(), edges, None, 1.0, 0.5).token.tolist() == [3, 3]
    for _ in range(50):
        probs = torch.rand(1, 1000).softmax(-1)
        assert int(draw(probs.log(), edges[1:], None, 1.0, 1.0).token) == 999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.5}, "temperature=-0.5.*greedy"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_sampling_parameters_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 8, **values})

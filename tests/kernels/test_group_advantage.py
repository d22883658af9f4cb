"""group_advantage against an independent loop, against the rules of verl and TRL, and at its edges."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_kernels import dispatch, group_advantage
from r4b_kernels.group_advantage import BASELINES

BACKENDS = ["cpu", "reference"]


def make(groups: int, binary: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = torch.randint(0, 9, (groups,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    count = int(offsets[-1])
    rewards = torch.randint(0, 2, (count,)).float() if binary else torch.randn(count)
    return rewards, offsets, torch.randint(0, 2, (count,))


def by_hand(rewards: list[float], offsets: list[int], mode: list[int], baseline: str, std: bool, eps: float):
    """Python's own statistics, response by response."""
    advantages = []
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        for me in range(start, stop):
            peers = [i for i in range(start, stop) if baseline != "per_mode" or mode[i] == mode[me]]
            values = [rewards[i] for i in peers]
            if len(set(values)) < 2:
                advantages.append(0.0)
                continue
            others = [rewards[i] for i in peers if i != me]
            centre = statistics.fmean(others if baseline == "leave_one_out" else values)
            advantages.append((rewards[me] - centre) / ((statistics.stdev(values) + eps) if std else 1.0))
    return advantages


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_rule(backend: str, baseline: str, std: bool, binary: bool) -> None:
    rewards, offsets, mode = make(200, binary)
    result = group_advantage(rewards, offsets, mode, baseline=baseline, std=std, eps=1e-4, backend=backend)
    expected = by_hand(rewards.tolist(), offsets.tolist(), mode.tolist(), baseline, std, 1e-4)
    torch.testing.assert_close(result.advantage, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert result.advantage.dtype == torch.float32 and result.token_advantage is None
    live = torch.tensor(expected) != 0
    assert torch.equal(result.live, live)
    rows = live.nonzero()[:, 0].tolist()
    assert result.live_rows.tolist() == rows + [-1] * (len(expected) - len(rows))
    assert int(result.num_live) == len(rows) and result.live_rows.dtype == result.num_live.dtype == torch.int32


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    groups=st.lists(st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.integers(0, 1)), max_size=12), max_size=6),
    baseline=st.sampled_from(BASELINES),
    std=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_any_groups(groups: list[list[tuple[float, int]]], baseline: str, std: bool, backend: str) -> None:
    members = [member for group in groups for member in group]
    rewards = torch.tensor([reward for reward, _ in members])
    mode = torch.tensor([mode for _, mode in members], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)
    result = group_advantage(rewards, offsets, mode, baseline=baseline, std=std, eps=1e-4, backend=backend)
    expected = by_hand(rewards.tolist(), offsets.tolist(), mode.tolist(), baseline, std, 1e-4)
    torch.testing.assert_close(result.advantage, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    live = result.live.nonzero()[:, 0].tolist()
    assert result.live_rows.tolist()[: int(result.num_live)] == live


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("value", [0.0, 0.9, 0.1, -1.3, 1e6])
def test_equal_rewards_give_exactly_zero(value: float, size: int, backend: str, baseline: str) -> None:
    rewards = torch.full((3 * size,), value)
    mode = torch.arange(3 * size) % 2
    result = group_advantage(rewards, torch.arange(4) * size, mode, baseline=baseline, backend=backend)
    assert not result.advantage.any() and not result.live.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_union_keeps_the_contrast_that_per_mode_erases(backend: str) -> None:
    """All thinking answers right, all direct ones wrong: the union teaches to think, per mode there is nothing."""
    mode = torch.tensor([1, 1, 1, 0, 0, 0])
    rewards, offsets = mode.float(), torch.tensor([0, 6])
    union = group_advantage(rewards, offsets, mode, backend=backend).advantage
    assert union.tolist() == pytest.approx([0.5 / math.sqrt(0.3)] * 3 + [-0.5 / math.sqrt(0.3)] * 3, rel=1e-5)
    assert not group_advantage(rewards, offsets, mode, baseline="per_mode", backend=backend).live.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mode_with_one_member_gets_zero(backend: str) -> None:
    rewards, mode = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1, 0, 0])
    result = group_advantage(rewards, torch.tensor([0, 3]), mode, baseline="per_mode", std=False, backend=backend)
    assert result.advantage.tolist() == [0.0, -0.5, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [True, False])
def test_tokens_carry_their_response(given: bool, backend: str) -> None:
    rewards, offsets, mode = make(30)
    lengths = torch.randint(0, 6, rewards.shape)
    token_offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).int()
    total = int(lengths.sum()) if given else None
    result = group_advantage(
        rewards, offsets.int(), mode.to(torch.int8), token_offsets=token_offsets, num_tokens=total, backend=backend
    )
    expected = [a for a, n in zip(result.advantage.tolist(), lengths.tolist(), strict=True) for _ in range(n)]
    assert result.token_advantage.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    result = group_advantage(
        torch.zeros(0), torch.zeros(1, dtype=torch.int64), none, token_offsets=torch.zeros(1).long(), backend=backend
    )
    assert [value.shape for value in result] == [(0,), (0,), (0,), (0,), ()]
    assert int(result.num_live) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offsets_do_not_drown_small_differences(backend: str) -> None:
    rewards = torch.tensor([1000.0, 1000.0, 1000.001, 1000.0])
    result = group_advantage(rewards, torch.tensor([0, 4]), torch.zeros(4).long(), eps=0.0, backend=backend)
    assert result.advantage.tolist() == pytest.approx([-0.5, -0.5, 1.5, -0.5], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_of_verl(backend: str) -> None:
    """verl's GRPO: score minus the group's mean, over its unbiased std + 1e-6; one index per prompt."""
    rewards = torch.rand(6, 8)
    mine = group_advantage(rewards.flatten(), torch.arange(7) * 8, torch.zeros(48).long(), backend=backend).advantage
    by_index: dict[int, list[float]] = {}
    for index, score in zip(torch.arange(6).repeat_interleave(8).tolist(), rewards.flatten().tolist(), strict=True):
        by_index.setdefault(index, []).append(score)
    theirs = []
    for scores in by_index.values():
        mean, spread = torch.tensor(scores).mean(), torch.tensor(scores).std()
        theirs += [(score - mean) / (spread + 1e-6) for score in scores]
    torch.testing.assert_close(mine, torch.stack(theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_of_trl(backend: str) -> None:
    """TRL's: a reshape to (prompts, generations), its mean and std, epsilon 1e-4 outside the root."""
    rewards = torch.rand(6, 8)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    offsets, mode = torch.arange(7) * 8, torch.zeros(48).long()
    mine = group_advantage(rewards.flatten(), offsets, mode, eps=1e-4, backend=backend).advantage
    torch.testing.assert_close(mine.view(6, 8), theirs)


def test_operator_contract_and_compile() -> None:
    rewards, offsets, mode = make(5)
    tokens = torch.arange(rewards.numel() + 1) * 2
    operator = torch.ops.r4b_kernels.group_advantage.default
    for backend in BACKENDS:
        torch.library.opcheck(operator, (rewards, offsets, mode, "union", True, 1e-6, tokens, int(tokens[-1]), backend))
    compiled = torch.compile(
        lambda r: group_advantage(r, offsets, mode, token_offsets=tokens, num_tokens=2 * rewards.numel()),
        backend="aot_eager",
        fullgraph=True,
    )
    for mine, plain in zip(
        compiled(rewards), group_advantage(rewards, offsets, mode, token_offsets=tokens), strict=True
    ):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, "rewards"),
        ({"rewards": torch.tensor([0.0, 1.0, torch.nan, 0.0])}, r"rewards\[2\]"),
        ({"group_offsets": torch.tensor([0, 3])}, "group_offsets"),
        ({"group_offsets": torch.tensor([0, 5, 4])}, "group_offsets"),
        ({"mode": torch.zeros(3, dtype=torch.int64)}, "mode"),
        ({"mode": torch.tensor([0, 1, 2, 0])}, "mode"),
        ({"baseline": "median"}, "baseline"),
        ({"mode": torch.zeros(4, dtype=torch.int64, device="meta")}, "mode is on meta and rewards on cpu"),
        ({"num_tokens": 4}, "num_tokens=4 needs token_offsets"),
        ({"token_offsets": torch.tensor([0, 1, 2])}, "token_offsets"),
        ({"token_offsets": torch.tensor([0, 1, 2, 3, 4]), "num_tokens": 5}, "token_offsets"),
    ],
)
def test_errors_name_the_argument(change: dict, named: str) -> None:
    arguments = {"rewards": torch.zeros(4), "group_offsets": torch.tensor([0, 4]), "mode": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=named):
        group_advantage(**(arguments | change))


def test_unknown_backend() -> None:
    with pytest.raises(dispatch.BackendError, match="abacus"):
        group_advantage(torch.zeros(2), torch.tensor([0, 2]), torch.zeros(2).long(), backend="abacus")

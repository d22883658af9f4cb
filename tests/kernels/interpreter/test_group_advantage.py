"""The Triton group_advantage against its definition, and on values that only a GPU would let through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r4b_kernels import group_advantage
from r4b_kernels.group_advantage import BASELINES, Advantage, reference
from r4b_kernels.group_advantage import triton as backend


def offsets_of(sizes: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


def make(sizes: list[int], binary: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(sizes)
    rewards = torch.randint(0, 2, (count,)).to(dtype) if binary else torch.randn(count).to(dtype)
    return rewards, offsets_of(sizes), torch.randint(0, 2, (count,))


def compare(rewards: Tensor, offsets: Tensor, mode: Tensor, same_in_any_order: Any = None, **arguments: Any) -> None:
    """Every result; advantages to 1e-6 of the definition's float64 ones (that is, to rounding), the rest exactly."""

    def run() -> dict[str, Tensor]:
        result = group_advantage(rewards, offsets, mode, backend="triton", **arguments)
        return {name: value for name, value in result._asdict().items() if value is not None}

    mine = same_in_any_order(run) if same_in_any_order else run()
    names = ("baseline", "std", "eps")
    chosen = {"baseline": "union", "std": True, "eps": 1e-6} | {n: v for n, v in arguments.items() if n in names}
    exact = reference.advantages(rewards, offsets, mode, **chosen)
    torch.testing.assert_close(mine["advantage"].double(), exact, rtol=1e-6, atol=1e-30)
    expected = group_advantage(rewards, offsets, mode, backend="reference", **arguments)
    assert mine["advantage"].dtype == torch.float32
    for name in ("live", "live_rows", "num_live"):
        value = getattr(expected, name)
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
    if expected.token_advantage is not None:
        lengths = arguments["token_offsets"].diff().long()
        assert torch.equal(mine["token_advantage"], mine["advantage"].repeat_interleave(lengths))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_is_the_definition(baseline: str, std: bool, binary: bool, same_in_any_order) -> None:
    rewards, offsets, mode = make([0, 1, 16, 2, 64, 0, 7, 130], binary)
    tokens = offsets_of(torch.randint(0, 70, rewards.shape).tolist(), torch.int32)
    compare(rewards, offsets, mode, same_in_any_order, baseline=baseline, std=std, eps=1e-4, token_offsets=tokens)


@pytest.mark.parametrize("sizes", [[1000], [63, 65, 129], [1] * 40, [0, 0], []], ids=str)
def test_sizes_of_groups(sizes: list[int]) -> None:
    rewards, offsets, mode = make(sizes)
    compare(rewards, offsets, mode, token_offsets=offsets_of([3] * len(rewards)), baseline="per_mode")


def test_long_responses_are_shared_out(monkeypatch: pytest.MonkeyPatch, same_in_any_order) -> None:
    """Several programs per group write disjoint tokens; the rewards are read by each of them."""
    monkeypatch.setattr(backend, "TILE", 256)
    rewards, offsets, mode = make([4, 20])
    tokens = offsets_of(torch.randint(0, 700, rewards.shape).tolist())
    assert backend._tile(24, 2, int(tokens[-1]))[2] > 1
    compare(rewards, offsets, mode, same_in_any_order, token_offsets=tokens)


def test_live_rows_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SCAN_ROWS", 64)
    compare(*make([8] * 25, binary=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode_dtype", [torch.bool, torch.int8, torch.int32], ids=str)
def test_dtypes_and_strides(dtype: torch.dtype, mode_dtype: torch.dtype) -> None:
    rewards, offsets, mode = make([5, 9], dtype=dtype)
    compare(
        rewards.repeat_interleave(2)[::2],
        offsets.int().repeat_interleave(2)[::2],
        mode.to(mode_dtype).repeat_interleave(2)[::2],
        baseline="leave_one_out",
    )


@pytest.mark.parametrize("value", [0.0, 0.9, 0.1, -1.3, 1e6])
@pytest.mark.parametrize("baseline", BASELINES)
def test_equal_rewards_give_exactly_zero(baseline: str, value: float) -> None:
    """In float64 too, where the mean of equal numbers is not always that number."""
    sizes = [1, 2, 3, 6, 70]
    rewards = torch.full((sum(sizes),), value, dtype=torch.float64)
    offsets, mode = offsets_of(sizes), torch.arange(sum(sizes)) % 2
    result = group_advantage(rewards, offsets, mode, baseline=baseline, backend="triton")
    assert not result.advantage.any() and not result.live.any() and int(result.num_live) == 0


def test_large_offsets_do_not_drown_small_differences() -> None:
    rewards = torch.tensor([1000.0, 1000.0, 1000.001, 1000.0])
    result = group_advantage(rewards, torch.tensor([0, 4]), torch.zeros(4).long(), eps=0.0, backend="triton")
    assert result.advantage.tolist() == pytest.approx([-0.5, -0.5, 1.5, -0.5], rel=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    groups=st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0, -3.5, 1e4]), st.integers(0, 1)), max_size=20), max_size=5
    ),
    baseline=st.sampled_from(BASELINES),
    std=st.booleans(),
    lengths=st.lists(st.integers(0, 9), min_size=100, max_size=100),
)
def test_any_groups(groups: list, baseline: str, std: bool, lengths: list[int]) -> None:
    members = [member for group in groups for member in group]
    rewards = torch.tensor([reward for reward, _ in members])
    mode = torch.tensor([mode for _, mode in members], dtype=torch.int64)
    tokens = offsets_of(lengths[: len(members)])
    offsets = offsets_of([len(group) for group in groups])
    compare(rewards, offsets, mode, baseline=baseline, std=std, token_offsets=tokens)


# Below, the values that raise on the CPU go to the backend itself, as they would reach it on a GPU.


def unchecked(rewards: Tensor, offsets: Tensor, mode: Tensor, tokens: Tensor, num_tokens: int) -> Advantage:
    return Advantage(*backend.forward(rewards, offsets, mode, "per_mode", True, 1e-6, tokens, num_tokens))


def healthy() -> dict[str, Tensor]:
    """Four groups of four responses of three tokens."""
    return {
        "rewards": torch.randn(16),
        "offsets": torch.arange(5) * 4,
        "mode": torch.tensor([0, 0, 1, 1] * 4),
        "tokens": torch.arange(17) * 3,
    }


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("rewards", 6, torch.nan),
        ("rewards", 6, torch.inf),
        ("mode", 6, 2),
        ("mode", 6, -1),
        ("tokens", 6, 30),
        ("tokens", 6, -5),
        ("tokens", 6, 1000),
    ],
)
def test_a_bad_value_spoils_its_group_alone(name: str, at: int, value: float) -> None:
    arguments = healthy()
    clean = unchecked(**arguments, num_tokens=48)
    arguments[name][at] = value
    result = unchecked(**arguments, num_tokens=48)
    spoilt = torch.zeros(16, dtype=torch.bool)
    spoilt[4:8] = True
    assert bool(result.advantage[spoilt].isnan().all()) and bool(result.live[spoilt].all())
    assert torch.equal(result.advantage[~spoilt], clean.advantage[~spoilt])
    assert bool(result.token_advantage[12:24].isnan().all())
    assert torch.equal(result.token_advantage[:12], clean.token_advantage[:12])
    assert torch.equal(result.token_advantage[24:], clean.token_advantage[24:])


@pytest.mark.parametrize(
    ("offsets", "spoilt"),
    [
        ([0, 6, 4, 12, 16], range(0, 12)),
        ([0, 4, 8, 12, 15], range(12, 16)),
        ([0, 4, 8, 12, 20], range(12, 16)),
        ([1, 4, 8, 12, 16], range(0, 4)),
        ([-3, 4, 8, 12, 16], range(0, 4)),
        ([0, 4, -8, 12, 16], range(0, 12)),
        ([0, 4, 10**9, 12, 16], range(4, 16)),
        ([5], range(0, 16)),
    ],
    ids=str,
)
def test_offsets_that_do_not_rise_spoil_the_groups_beside_them(offsets: list[int], spoilt: range) -> None:
    arguments = healthy() | {"offsets": torch.tensor(offsets)}
    result = unchecked(**arguments, num_tokens=48)
    expected = torch.zeros(16, dtype=torch.bool)
    expected[list(spoilt)] = True
    assert torch.equal(result.advantage.isnan(), expected)
    assert torch.equal(result.token_advantage.isnan(), expected.repeat_interleave(3))


def test_tokens_without_a_response_are_nan() -> None:
    arguments = healthy()
    result = unchecked(**arguments, num_tokens=60)
    assert bool(result.token_advantage[48:].isnan().all()) and bool(result.advantage[12:].isnan().all())
    assert not bool(result.advantage[:12].isnan().any())
    result = unchecked(**(arguments | {"tokens": arguments["tokens"] + 2}), num_tokens=50)
    assert bool(result.token_advantage[:2].isnan().all()) and not bool(result.token_advantage[14:].isnan().any())


def test_tokens_for_no_response_are_nan() -> None:
    none = torch.zeros(0)
    result = unchecked(none, torch.tensor([0]), none.long(), torch.tensor([0]), 5)
    assert bool(result.token_advantage.isnan().all()) and int(result.num_live) == 0

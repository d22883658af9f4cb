"""Triton backend of group_advantage: a program per group does everything but the list of live rows.

Nothing is read back, so what is malformed cannot raise: it is never followed out of bounds, and the groups it touches
get NaN. Of such input every row and token is still written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # (responses x tokens) that are written at once
TILES = 4  # about as many per program: with more, the tokens of a group are shared out
SCAN_ROWS = 4096


def forward(
    rewards: Tensor,
    group_offsets: Tensor,
    mode: Tensor,
    baseline: str,
    std: bool,
    eps: float,
    token_offsets: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(advantage, token_advantage, live, live_rows, num_live): see group_advantage."""
    num_rows, num_groups = rewards.numel(), group_offsets.numel() - 1
    advantage = rewards.new_empty(num_rows, dtype=torch.float32)
    token_advantage = rewards.new_empty(num_tokens, dtype=torch.float32)
    live = rewards.new_empty(num_rows, dtype=torch.bool)
    live_rows = rewards.new_empty(num_rows, dtype=torch.int32)
    num_live = rewards.new_empty((), dtype=torch.int32)
    if num_rows == 0:
        return advantage, token_advantage.fill_(torch.nan), live, live_rows, num_live.zero_()
    rows, columns, shares = _tile(num_rows, max(num_groups, 1), num_tokens)
    _advantages[max(num_groups, 1), shares](
        rewards.contiguous(),
        group_offsets.contiguous(),
        mode.contiguous().view(torch.uint8) if mode.dtype == torch.bool else mode.contiguous(),
        None if token_offsets is None else token_offsets.contiguous(),
        *(advantage, token_advantage, live.view(torch.uint8), num_rows, num_groups, num_tokens),
        SETS=2 if baseline == "per_mode" else 1,
        LEAVE_ONE_OUT=baseline == "leave_one_out",
        STD=std,
        EPS=eps,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    block = min(SCAN_ROWS, triton.next_power_of_2(num_rows))
    _list_live[1,](live.view(torch.uint8), live_rows, num_live, num_rows, BLOCK=block, num_warps=8)
    return advantage, token_advantage, live, live_rows, num_live


def _tile(num_rows: int, num_groups: int, num_tokens: int) -> tuple[int, int, int]:
    """(responses, tokens of each, programs per group) for groups of ordinary size; larger ones take more steps."""
    rows = min(64, max(16, triton.next_power_of_2(triton.cdiv(num_rows, num_groups))))
    return rows, TILE // rows, min(32, max(1, num_tokens // (num_groups * TILE * TILES)))


@triton.jit(do_not_specialize=["num_rows", "num_groups", "num_tokens"])
def _advantages(
    rewards, group_offsets, mode, token_offsets, advantage, token_advantage, live, num_rows, num_groups, num_tokens,
    SETS: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, STD: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All in float64. A group is one set or, with SETS = 2, one for each mode; [SETS, ROWS] tells who is in which."""
    start, stop, bad = _rows_of(group_offsets, tl.program_id(0), num_groups, num_rows)
    if token_offsets is not None:
        low = tl.where(start == 0, 0, _clamped(tl.load(token_offsets + start).to(tl.int64), 0, num_tokens))
        high = tl.where(
            stop == num_rows, num_tokens, _clamped(tl.load(token_offsets + stop).to(tl.int64), 0, num_tokens)
        )

    count = tl.zeros([SETS], dtype=tl.float64)
    total = tl.zeros([SETS], dtype=tl.float64)
    lowest = tl.full([SETS], float("inf"), dtype=tl.float64)
    highest = tl.full([SETS], float("-inf"), dtype=tl.float64)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        reward, inside, wrong = _load_rewards(rewards, mode, row, stop, SETS)
        if token_offsets is not None:
            wrong |= _tokens_of(token_offsets, row, start, stop, low, high)[2]
        bad |= tl.max(wrong.to(tl.int32), axis=0)
        count += tl.sum(inside.to(tl.float64), axis=1)
        total += tl.sum(tl.where(inside, reward[None, :], 0.0), axis=1)
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, reward[None, :], float("inf")), axis=1))
        highest = tl.maximum(highest, tl.max(tl.where(inside, reward[None, :], float("-inf")), axis=1))
    mean = total / tl.maximum(count, 1.0)
    others = tl.maximum(count - 1.0, 1.0)

    scale = tl.full([SETS], 1.0, dtype=tl.float64)
    if STD:
        squares = tl.zeros([SETS], dtype=tl.float64)
        for first in range(start, stop, ROWS):
            row = first + tl.arange(0, ROWS)
            reward, inside, wrong = _load_rewards(rewards, mode, row, stop, SETS)
            difference = tl.where(inside, reward[None, :] - mean[:, None], 0.0)
            squares += tl.sum(difference * difference, axis=1)
        scale = 1.0 / (tl.sqrt(squares / others) + EPS)
    if LEAVE_ONE_OUT:
        # r - mean of the others = (r - mean of all) * n / (n - 1)
        scale *= count / others
    scale = tl.where(lowest < highest, scale, 0.0)

    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        reward, inside, wrong = _load_rewards(rewards, mode, row, stop, SETS)
        value = tl.sum(tl.where(inside, (reward[None, :] - mean[:, None]) * scale[:, None], 0.0), axis=0)
        value = tl.where(bad != 0, float("nan"), value).to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(advantage + row, value, mask=row < stop)
            tl.store(live + row, (value != 0.0).to(tl.uint8), mask=row < stop)
        if token_offsets is not None:
            begin, length, wrong = _tokens_of(token_offsets, row, start, stop, low, high)
            step = tl.num_programs(1) * COLUMNS
            for at in range(tl.program_id(1) * COLUMNS, tl.max(length, axis=0), step):
                column = at + tl.arange(0, COLUMNS)
                here = token_advantage + begin[:, None] + column[None, :]
                tl.store(here, tl.broadcast_to(value[:, None], [ROWS, COLUMNS]), mask=column[None, :] < length[:, None])


@triton.jit
def _rows_of(group_offsets, group, num_groups, num_rows):
    """The rows [start, stop) of a group, and whether its offsets or its neighbours' are wrong (int32).

    Clamped, and with the ends put where they belong, the ranges cover all rows whatever the offsets are.
    """
    first = tl.load(group_offsets + group)
    last = tl.load(group_offsets + group + 1, mask=group < num_groups, other=-1)
    before = tl.load(group_offsets + group - 1, mask=group > 0, other=0)
    after = tl.load(group_offsets + group + 2, mask=group + 2 <= num_groups, other=num_rows)
    bad = (before > first) | (first > last) | (last > after) | (first < 0) | (last > num_rows)
    bad |= (group == 0) & (first != 0)
    bad |= (group + 1 >= num_groups) & (last != num_rows)
    start = tl.where(group == 0, 0, _clamped(first, 0, num_rows))
    stop = tl.where(group + 1 >= num_groups, num_rows, _clamped(last, 0, num_rows))
    return start.to(tl.int32), stop.to(tl.int32), bad.to(tl.int32)


@triton.jit
def _load_rewards(rewards, mode, row, stop, SETS: tl.constexpr):
    """Rewards float64 [ROWS], who is in which set [SETS, ROWS], and which rows hold what they must not."""
    here = row < stop
    reward = tl.load(rewards + row, mask=here, other=0.0).to(tl.float64)
    taken = tl.load(mode + row, mask=here, other=0).to(tl.int32)
    inside = here[None, :]
    if SETS == 2:
        inside = inside & (taken[None, :] == tl.arange(0, SETS)[:, None])
    wrong = here & (((taken != 0) & (taken != 1)) | ~(tl.abs(reward) < float("inf")))
    return reward, inside, wrong


@triton.jit
def _tokens_of(token_offsets, row, start, stop, low, high):
    """First token and number of tokens of each row, and which rows have wrong offsets.

    Whatever the offsets are, the rows of a group cover its tokens [low, high) and no others.
    """
    here = row < stop
    first = tl.load(token_offsets + row, mask=here, other=0).to(tl.int64)
    last = tl.load(token_offsets + row + 1, mask=here, other=0).to(tl.int64)
    begin = tl.where(row == start, low, _clamped(first, low, high))
    end = tl.where(row + 1 == stop, high, _clamped(last, low, high))
    wrong = here & ((begin != first) | (end != last) | (begin > end))
    return begin, tl.where(here, end - begin, 0).to(tl.int32), wrong


@triton.jit
def _clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit(do_not_specialize=["num_rows"])
def _list_live(live, live_rows, num_live, num_rows, BLOCK: tl.constexpr):
    """The live rows in order, then -1: one program, a running count over blocks."""
    count = 0
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here = tl.load(live + row, mask=row < num_rows, other=0).to(tl.int32)
        tl.store(live_rows + count + tl.cumsum(here, 0) - here, row, mask=here == 1)
        count += tl.sum(here, axis=0)
    tl.store(num_live, count)
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(live_rows + row, -1, mask=(row >= count) & (row < num_rows))

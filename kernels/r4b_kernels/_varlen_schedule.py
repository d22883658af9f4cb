"""Which tile of rows meets which ranges of tokens: the schedule of variable-length attention, made on the device.

Built by five small kernels from ``offsets`` and ``parent`` alone, without a wait for the device: the grids depend on T
and S, which the host knows, and surplus tiles are empty. No kernel is compiled anew when lengths change.

Tiles are cut within *runs*: at most T // block + runs + 1. For queries a run is a maximal sequence of segments with the
same parent: its tiles straddle segments, for all meet the same rectangle of parent keys, and short answers fill tiles
together. For keys every segment is a run: all keys of a tile meet the same queries, its own and its children's.

    stream    | prompt 0   | answer 1 | answer 2  | answer 3 | prompt 4 ...
    parent    | -1         | 0        | 0         | 0        | -1
    queries   [----][----] [----][----][----][----][----][-] [----]
    keys      [----][----] [----][---][----][----][----][---] [----]

A malformed layout (offsets that do not start at 0, decrease or pass T; a parent that is not an earlier segment without
a parent) is detected on the device. Every tile is then BROKEN, and its kernels write NaN: nothing is read or written
outside of tensors.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A tile is eight int32 numbers: its rows [START, STOP); the other range it meets without a causal mask, [FAR, FAR_STOP)
# (parent keys of a tile of queries, child queries of a tile of keys); its own segments' range [OWN, OWN_STOP); flags;
# and the first segment of its run.
START, STOP, FAR, FAR_STOP, OWN, OWN_STOP, FLAGS, SEGMENT = map(tl.constexpr, range(8))
COLUMNS = tl.constexpr(8)
STRADDLES = tl.constexpr(1)  # the rows are of several segments: the own range needs a mask throughout
SCATTERED = tl.constexpr(2)  # rows of the far range may belong to others
PADDING = tl.constexpr(4)  # no segment's rows: their results are 0
BROKEN = tl.constexpr(8)  # the layout is malformed: results are NaN

_BLOCK = 256
_RANKS = 64


class Schedule:
    """The tiles of one layout over ``num_tokens`` rows.

    Attributes:
        token_start, token_stop, token_parent: int32 [T], the segment a token is in, and that segment's parent or -1.
    """

    def __init__(self, offsets: Tensor, parent: Tensor | None, num_tokens: int, causal: bool) -> None:
        self.num_tokens, self.num_segments, self.causal = num_tokens, offsets.numel() - 1, causal
        self._shared = parent is not None
        # Not the tensors themselves: the schedule is kept for as long as those live.
        self._offsets = offsets.detach().contiguous()
        # Without parents the kernels never read these two.
        self._parent = self._offsets if parent is None else parent.detach().contiguous()
        # 0 is neutral: T - first child's start, last child's stop, the children's tokens; then the verdict.
        zeros = offsets.new_zeros((3 * self.num_segments if self._shared else 0) + 1)
        self._verdict, self._children = zeros[:1], zeros[1:]
        self.token_start, self.token_stop, self.token_parent = _rows(offsets, num_tokens)
        _describe[triton.cdiv(max(num_tokens, self.num_segments + 1), _BLOCK),](
            self._offsets,
            self._parent,
            self._children,
            self._verdict,
            self.token_start,
            self.token_stop,
            self.token_parent,
            num_tokens,
            self.num_segments,
            (self.num_segments + 1).bit_length(),
            SHARED=self._shared,
            BLOCK=_BLOCK,
        )
        self._tiles: dict[tuple[bool, int], Tensor] = {}

    def queries(self, block: int) -> Tensor:
        """int32 [N, 8]: tiles of at most ``block`` query rows, those with the most keys first, then empty ones."""
        return self._cut(block, keys=False)

    def keys(self, block: int) -> Tensor:
        """int32 [N, 8]: tiles of at most ``block`` key rows, those with the most queries first, then empty ones."""
        return self._cut(block, keys=True)

    def _cut(self, block: int, keys: bool) -> Tensor:
        if (tiles := self._tiles.get((keys, block))) is None:
            tiles = self._tiles[keys, block] = self._make_tiles(block, keys)
        return tiles

    def _make_tiles(self, block: int, keys: bool) -> Tensor:
        offsets, segments = self._offsets, self.num_segments
        # Without parents all queries are one run. The padding is another.
        num_runs = segments + 1 if self._shared or keys else 2
        slots = self.num_tokens // block + num_runs + 1
        # Of run r: first token, first segment, tiles up to its end. And how many runs there are.
        runs = _rows(offsets, num_runs + 1)
        count = offsets.new_empty(1)
        _find_runs[1,](
            offsets,
            self._parent,
            *runs,
            count,
            self.num_tokens,
            segments,
            ROWS=block,
            KEYS=keys,
            SHARED=self._shared,
            BLOCK=1024,
        )
        tiles, cost = offsets.new_empty(slots, COLUMNS.value), offsets.new_empty(slots)
        _cut_runs[triton.cdiv(slots, _BLOCK),](
            offsets,
            self._parent,
            self._children,
            self._verdict,
            self.token_start,
            self.token_stop,
            *runs,
            count,
            tiles,
            cost,
            self.num_tokens,
            segments,
            slots,
            num_runs.bit_length() + 1,
            ROWS=block,
            KEYS=keys,
            SHARED=self._shared,
            CAUSAL=self.causal,
            BLOCK=_BLOCK,
        )
        ordered = torch.empty_like(tiles)
        _order[triton.cdiv(slots, _RANKS),](tiles, cost, ordered, slots, BLOCK=_RANKS)
        return ordered


def _rows(like: Tensor, length: int) -> tuple[Tensor, ...]:
    """Memory for three rows. Each starts at 16 bytes: else kernels would be compiled anew for odd lengths."""
    return like.new_empty(3, triton.cdiv(length, 4) * 4).unbind()


# Of every offsets tensor alive: by T, causality and stream, the parent tensor, the versions and the schedule.
_kept: MutableMapping[Tensor, dict[tuple, tuple]] = WeakTensorKeyDictionary()


def schedule_for(offsets: Tensor, parent: Tensor | None, num_tokens: int, causal: bool) -> Schedule:
    """The schedule of a layout: made at its first use, then kept for as long as its ``offsets`` tensor lives.

    All layers, forward and backward, find it by the identity of the two tensors and their version counters: a change
    in place, another parent tensor, another stream or another T makes a new one. Where the content can change unseen
    nothing is kept: inside a CUDA graph's capture (its replay must make the schedule anew), and for tensors made in
    inference mode (they have no version counter).
    """
    stream = 0
    if offsets.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return Schedule(offsets, parent, num_tokens, causal)
        stream = torch.cuda.current_stream(offsets.device).cuda_stream
    if offsets.is_inference() or (parent is not None and parent.is_inference()):
        return Schedule(offsets, parent, num_tokens, causal)
    versions = offsets._version, 0 if parent is None else parent._version
    schedules = _kept.setdefault(offsets, {})
    known = schedules.get((num_tokens, causal, stream))
    if known is not None and known[0] is parent and known[1] == versions:
        return known[2]
    schedule = Schedule(offsets, parent, num_tokens, causal)
    schedules[num_tokens, causal, stream] = parent, versions, schedule
    return schedule


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "steps"])
def _describe(
    offsets,
    parent,
    children,
    verdict,
    token_start,
    token_stop,
    token_parent,
    num_tokens,
    num_segments,
    steps,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Check segments, sum up the children of each, and find every token's segment by bisection."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < num_segments
    start = tl.load(offsets + index, mask=index <= num_segments, other=0)
    stop = tl.load(offsets + index + 1, mask=live, other=0)
    bad = live & ((start > stop) | (stop > num_tokens)) | ((index == 0) & (start != 0))
    if SHARED:
        owner = tl.load(parent + index, mask=live, other=-1)
        child = live & (owner >= 0) & (owner < index)
        grandparent = tl.load(parent + owner, mask=child, other=-1)
        bad |= live & (owner != -1) & ((~child) | (grandparent != -1))
        child &= (stop > start) & ~bad
        tl.atomic_max(children + owner, num_tokens - tl.where(child, start, 0), mask=child)
        tl.atomic_max(children + num_segments + owner, stop, mask=child)
        length = tl.where(child, stop, 0) - tl.where(child, start, 0)
        tl.atomic_add(children + 2 * num_segments + owner, length, mask=child)
    tl.atomic_max(verdict + tl.zeros_like(index), 1, mask=bad)

    low = tl.zeros_like(index)
    high = low + num_segments + 1
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(offsets + middle, mask=low < high, other=0) <= index
        low, high = tl.where((low < high) & before, middle + 1, low), tl.where((low < high) & ~before, middle, high)
    segment = low - 1
    live = index < num_tokens
    inside = live & (segment >= 0) & (segment < num_segments)
    tl.store(token_start + index, tl.load(offsets + segment, mask=inside, other=0), mask=live)
    tl.store(token_stop + index, tl.load(offsets + segment + 1, mask=inside, other=0), mask=live)
    if SHARED:
        tl.store(token_parent + index, tl.load(parent + segment, mask=inside, other=-1), mask=live)


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def _find_runs(
    offsets,
    parent,
    run_start,
    run_segment,
    run_tiles,
    run_count,
    num_tokens,
    num_segments,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: list the runs, the padding last, and sum up their tiles."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([], tl.int32)
    if SHARED or KEYS:
        for base in range(0, num_segments, BLOCK):
            segment = base + lane
            live = segment < num_segments
            first = live
            if not KEYS:
                owner = tl.load(parent + segment, mask=live, other=-1)
                before = tl.load(parent + segment - 1, mask=live & (segment > 0), other=-1)
                first = live & ((segment == 0) | (owner != before))
            run = count + tl.cumsum(first.to(tl.int32), 0) - 1
            # Clamped: a malformed layout gets this far, though no further.
            start = tl.minimum(tl.maximum(tl.load(offsets + segment, mask=live, other=0), 0), num_tokens)
            tl.store(run_start + run, start, mask=first)
            tl.store(run_segment + run, segment, mask=first)
            count += tl.sum(first.to(tl.int32), 0)
    else:
        tl.store(run_start, 0)
        tl.store(run_segment, 0)
        count += 1
    tl.store(run_start + count, tl.minimum(tl.maximum(tl.load(offsets + num_segments), 0), num_tokens))
    tl.store(run_segment + count, num_segments)
    tl.store(run_start + count + 1, num_tokens)
    tl.store(run_count, count + 1)
    tl.debug_barrier()
    tiles = tl.zeros([], tl.int32)
    for base in range(0, count + 1, BLOCK):
        run = base + lane
        live = run <= count
        start = tl.load(run_start + run, mask=live, other=0)
        stop = tl.load(run_start + run + 1, mask=live, other=0)
        number = (stop - start + ROWS - 1) // ROWS
        tl.store(run_tiles + run, tiles + tl.cumsum(number, 0), mask=live)
        tiles += tl.sum(number, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_slots", "steps"])
def _cut_runs(
    offsets,
    parent,
    children,
    verdict,
    token_start,
    token_stop,
    run_start,
    run_segment,
    run_tiles,
    run_count,
    tiles,
    cost,
    num_tokens,
    num_segments,
    num_slots,
    steps,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill every slot: find its run by bisection, then its ranges. A tile's cost is the rows it meets."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tiles + COLUMNS * slot
    live = slot < num_slots
    count = tl.load(run_count)
    if tl.load(verdict) != 0:
        start = tl.minimum(slot * ROWS, num_tokens)
        tl.store(here + START, start, mask=live)
        tl.store(here + STOP, tl.minimum(start + ROWS, num_tokens), mask=live)
        tl.store(here + FLAGS, tl.full([BLOCK], PADDING + BROKEN, tl.int32), mask=live)
        tl.store(cost + slot, tl.where(start < num_tokens, 0, -1), mask=live)
    else:
        low = tl.zeros_like(slot)
        high = low + count
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(run_tiles + middle, mask=low < high, other=0) <= slot
            low, high = tl.where((low < high) & before, middle + 1, low), tl.where((low < high) & ~before, middle, high)
        live_tile = live & (low < count)
        run = low
        earlier = tl.load(run_tiles + run - 1, mask=live_tile & (run > 0), other=0)
        start = tl.load(run_start + run, mask=live_tile, other=0) + (slot - earlier) * ROWS
        stop = tl.minimum(start + ROWS, tl.load(run_start + run + 1, mask=live_tile, other=0))
        start = tl.where(live_tile, start, 0)
        stop = tl.where(live_tile, stop, 0)
        segment = tl.load(run_segment + run, mask=live_tile, other=num_segments)
        padding = run == count - 1
        real = live_tile & ~padding

        own = tl.load(token_start + start, mask=real, other=0)
        own_stop = tl.load(token_stop + stop - 1, mask=real, other=0)
        flags = tl.where(padding, PADDING, 0)
        flags |= tl.where(tl.load(token_start + stop - 1, mask=real, other=0) != own, STRADDLES, 0)
        if CAUSAL:
            if KEYS:
                own = tl.where(real, start, 0)
            else:
                own_stop = tl.where(real, stop, 0)
        far = tl.zeros_like(slot)
        far_stop = far
        if SHARED:
            if KEYS:
                far_stop = tl.load(children + num_segments + segment, mask=real, other=0)
                far = num_tokens - tl.load(children + segment, mask=real, other=0)
                far = tl.where(far_stop > 0, far, 0)
                tokens = tl.load(children + 2 * num_segments + segment, mask=real, other=0)
                flags |= tl.where(far_stop - far != tokens, SCATTERED, 0)
            else:
                owner = tl.load(parent + segment, mask=real, other=-1)
                shared = real & (owner >= 0)
                far = tl.load(offsets + owner, mask=shared, other=0)
                far_stop = tl.load(offsets + owner + 1, mask=shared, other=0)
        tl.store(here + START, start, mask=live)
        tl.store(here + STOP, stop, mask=live)
        tl.store(here + FAR, far, mask=live)
        tl.store(here + FAR_STOP, far_stop, mask=live)
        tl.store(here + OWN, own, mask=live)
        tl.store(here + OWN_STOP, own_stop, mask=live)
        tl.store(here + FLAGS, flags, mask=live)
        tl.store(here + SEGMENT, segment, mask=live)
        tl.store(cost + slot, tl.where(live_tile, far_stop - far + own_stop - own, -1), mask=live)


@triton.jit(do_not_specialize=["num_slots"])
def _order(tiles, cost, ordered, num_slots, BLOCK: tl.constexpr):
    """Sort tiles by falling cost, ties by position: each counts those that go before it, and moves there."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < num_slots
    mine = tl.load(cost + slot, mask=live, other=-2)
    rank = tl.zeros_like(slot)
    for base in range(0, num_slots, BLOCK):
        other = base + tl.arange(0, BLOCK)
        theirs = tl.load(cost + other, mask=other < num_slots, other=-2)
        ahead = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (other[None, :] < slot[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
    column = tl.arange(0, COLUMNS)
    values = tl.load(tiles + COLUMNS * slot[:, None] + column[None, :], mask=live[:, None], other=0)
    tl.store(ordered + COLUMNS * rank[:, None] + column[None, :], values, mask=live[:, None])

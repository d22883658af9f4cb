"""Records as an endless stream of packed sequences that is the same for any number of data-parallel ranks.

A step consumes ``lanes`` packed sequences; sequence b of every step comes from lane b. Lane b reads records b,
b + lanes, ... of the epoch's order, holds a few at hand, and fills a sequence with those that fit best. Rank r serves
lanes r, r + ranks, ... So the data of a step depend on the seed and the files alone, and where a lane stands is a few
numbers: its epoch, its cursor and which records it holds.

Planning takes token counts alone, which need the text and the size in an image's header; pixels are decoded when a
sequence goes out. What cannot be used is set aside with the reason, and the stream goes on.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from r4b_core.data.batch import PackedBatch
from r4b_core.data.dali import Backend, open_images
from r4b_core.data.encoding import EncodedPrompt, decision_of, encode_response
from r4b_core.data.files import TEACHER, USED, RecordFiles, Row, record_of, teacher_of
from r4b_core.data.images import ImageError
from r4b_core.data.packing import Response, pack_sequence
from r4b_core.data.processing import PromptError
from r4b_core.data.records import Record, ResponseError, Teacher, image_size, to_sample
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import Tokenizer
from r4b_core.modes import Mode

WINDOW_ROWS = 1024
CACHED_WINDOWS = 8


class RecordProcessor(Protocol):
    """What is asked of a model family here; see models/processor.py."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def encode_prompt(self) -> Callable[[Sample], EncodedPrompt]: ...

    @property
    def patch_values(self) -> int: ...

    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int: ...


class Order:
    """A seeded permutation of all records for each epoch that reads row groups one after the other.

    Row groups are shuffled and joined to windows of ``WINDOW_ROWS`` rows or more, within which rows are shuffled. It is
    a pure function of (seed, epoch).
    """

    def __init__(self, group_rows: Sequence[int], seed: int, window_rows: int = WINDOW_ROWS) -> None:
        self._rows = np.array(group_rows, dtype=np.int64)
        self._seed, self._window_rows = seed, window_rows
        self._layout = lru_cache(4)(self._lay_out)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(window, place in it) of the record at a position of the epoch's order."""
        _, starts = self._layout(epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return window, position - int(starts[window])

    def window(self, epoch: int, window: int) -> tuple[int, NDArray[np.int64]]:
        """(position of its first record; int64 [n, 2]: group and row of each record in order)."""
        cuts, starts = self._layout(epoch)
        groups = cuts[window]
        rows = self._rows[groups]
        within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        records = np.stack([np.repeat(groups, rows), within], axis=1)
        shuffled = np.random.default_rng([self._seed, epoch, 1 + window]).permutation(len(records))
        return int(starts[window]), records[shuffled]

    def _lay_out(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Groups of each window, and the position at which each begins."""
        groups = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._rows))
        cuts: list[NDArray[np.int64]] = []
        first = held = 0
        for place, group in enumerate(groups.tolist()):
            held += int(self._rows[group])
            if held >= self._window_rows or place == len(groups) - 1:
                cuts.append(groups[first : place + 1])
                first, held = place + 1, 0
        sizes = np.array([self._rows[cut].sum() for cut in cuts])
        return cuts, sizes.cumsum() - sizes


class _Windows:
    """The rows of some windows that this rank's lanes have yet to take; the longest untouched one goes first."""

    def __init__(self, files: RecordFiles, order: Order, mine: Callable[[NDArray[np.int64]], NDArray[np.bool_]]):
        self._files, self._order, self._mine = files, order, mine
        self._columns = (*USED, *(TEACHER if files.has(*TEACHER) else ()))
        self._cache: OrderedDict[tuple[int, int], dict[int, Row]] = OrderedDict()
        self.limit = CACHED_WINDOWS

    def take(self, epoch: int, position: int) -> Row:
        window, place = self._order.locate(epoch, position)
        key = epoch, window
        if place not in self._cache.get(key, ()):
            self._cache[key] = self._load(epoch, window)
        self._cache.move_to_end(key)
        if len(self._cache) > self.limit:
            self._cache.popitem(last=False)
        return self._cache[key].pop(place)

    @property
    def held(self) -> int:
        """Rows in memory."""
        return sum(map(len, self._cache.values()))

    def _load(self, epoch: int, window: int) -> dict[int, Row]:
        first, records = self._order.window(epoch, window)
        places = np.flatnonzero(self._mine(first + np.arange(len(records))))
        chosen = records[places]
        rows: dict[int, Row] = {}
        for group in np.unique(chosen[:, 0]).tolist():
            here = chosen[:, 0] == group
            found = self._files.read(group, chosen[here, 1], self._columns)
            for place, row in zip(places[here].tolist(), chosen[here, 1].tolist(), strict=True):
                rows[place] = found[row]
                if rows[place]["id"] is None:
                    file = self._files.files[self._files.groups[group].file]
                    rows[place]["id"] = f"{file.path.name}, row group {self._files.groups[group].number}, row {row}"
        return rows


class Bad(NamedTuple):
    """A record that cannot be used: its key, a short constant reason, and what exactly."""

    id: str
    reason: str
    detail: str


class StreamError(ValueError):
    """A lane none of whose records can be used; ``bad`` says why of each."""

    bad: list[Bad] = []


def reason_of(error: ValueError) -> str:
    """The phrase that quarantined records are counted by."""
    kinds = {ImageError: "image cannot be used", PromptError: "question cannot be used"}
    kinds |= {ResponseError: "response cannot be used", TooLong: "longer than the packing capacity"}
    return next((phrase for kind, phrase in kinds.items() if isinstance(error, kind)), "text cannot be encoded")


class TooLong(ValueError):
    """A record of more tokens than a packed sequence holds."""


@dataclass
class Item:
    """A record at hand: where it comes from, its response's tokens (int32), and its length in the stream."""

    epoch: int
    index: int
    record: Record
    sample: Sample
    response: NDArray[np.int32]
    length: int
    teacher: Teacher | None = None


class Planner:
    """Makes items of rows, and micro-batches of items.

    Args:
        capacity: most tokens of a sequence.
        multiple, pad_to: as for ``pack_sequence``.
        mask_empty_think: no loss on the forced tokens of direct responses.
        teacher_slots: K; the rows' teacher columns become ``teacher_ids`` and ``teacher_logprobs`` [R, K]. 0: none.
        decoder: of images; ``gpu`` is the one that DALI works on, None its CPU backend.

    Raises:
        ValueError: the decoder is not installed.
    """

    def __init__(
        self,
        processor: RecordProcessor,
        capacity: int,
        *,
        multiple: int = 1,
        pad_to: int | None = None,
        mask_empty_think: bool = False,
        teacher_slots: int = 0,
        decoder: Backend = "pillow",
        gpu: int | None = None,
    ) -> None:
        self._open = partial(open_images, backend=decoder, device_id=gpu)
        self._open([])  # says now if the decoder is missing
        self.processor, self.capacity, self.multiple, self.pad_to = processor, capacity, multiple, pad_to
        self.mask_empty_think, self.teacher_slots = mask_empty_think, teacher_slots

    def plan(self, row: Row, epoch: int, index: int) -> Item | Bad:
        record = record_of(row)
        try:
            sample = to_sample(record, images=False)
            if sample.response is None:
                raise ResponseError("there is no response")
            tokens = encode_response(self.processor.tokenizer, sample)
            teacher = teacher_of(row) if self.teacher_slots else None
            if teacher is not None:
                self._check(teacher, len(tokens))
            prompt = self.processor.prompt_length(sample.question, [image_size(image) for image in record.images])
            # The last token is a target alone and takes no place in the stream.
            length = prompt + len(tokens) - 1
            if length > self.capacity:
                raise TooLong(
                    f"prompt of {prompt} and response of {len(tokens)} tokens exceed packing.capacity={self.capacity}"
                )
        except ValueError as error:
            return Bad(record.key, reason_of(error), str(error))
        return Item(epoch, index, record, sample, np.array(tokens, np.int32), length, teacher)

    def emit(self, items: Sequence[Item]) -> tuple[PackedBatch, list[Bad]]:
        """The packed sequence of the items, and those whose pixels proved to be damaged."""
        chosen: list[tuple[EncodedPrompt, Response]] = []
        used, bad, room = [], [], self.capacity
        opened = iter(self._open([image for item in items for image in item.record.images]))
        for item in items:
            images = [next(opened) for _ in item.record.images]
            try:
                sample = replace(item.sample, images=[_sound(image) for image in images])
                prompt = self.processor.encode_prompt(sample)
                room -= (length := prompt.num_tokens + len(item.response) - 1)
                if room < 0:
                    room += length
                    raise ImageError(f"its header tells of {item.length} tokens and its pixels of {length}")
            except ValueError as error:
                bad.append(Bad(item.record.key, reason_of(error), str(error)))
                continue
            chosen.append((prompt, Response(item.response.tolist(), self._weights(item))))
            used.append(item)
        batch = pack_sequence(
            chosen,
            self.processor.patch_values,
            multiple=self.multiple,
            pad_to=self.pad_to,
            pad_token=self.processor.tokenizer.pad_token,
        )
        if self.teacher_slots:
            batch.row_data |= self._teacher_columns(used)
        return batch, bad

    def _weights(self, item: Item) -> list[float]:
        forced = 0
        if self.mask_empty_think and decision_of(item.sample) is Mode.DIRECT:
            forced = len(self.processor.tokenizer.mode_tokens.forced(Mode.DIRECT))
        return [0.0] * forced + [1.0] * (len(item.response) - forced)

    def _check(self, teacher: Teacher, tokens: int) -> None:
        counts = [len(ids) for ids in teacher.ids]
        if len(counts) != tokens or counts != [len(values) for values in teacher.logprobs]:
            raise ResponseError(
                f"teacher_ids has {len(counts)} rows for a response of {tokens} tokens, or another shape than "
                "teacher_logprobs: the teacher's tokens are not those of this tokenizer"
            )

    def _teacher_columns(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """teacher_ids int64 and teacher_logprobs float32, [R, K]; unused slots have the id -1."""
        rows, slots = sum(len(item.response) for item in items), self.teacher_slots
        ids, logprobs = torch.full((rows, slots), -1), torch.zeros(rows, slots)
        row = 0
        for item in items:
            said = zip(item.teacher.ids, item.teacher.logprobs, strict=True) if item.teacher is not None else ()
            for place, (tokens, values) in enumerate(said, row):
                ids[place, : len(tokens[:slots])] = torch.tensor(tokens[:slots], dtype=torch.int64)
                logprobs[place, : len(values[:slots])] = torch.tensor(values[:slots])
            row += len(item.response)
        return {"teacher_ids": ids, "teacher_logprobs": logprobs}


@dataclass
class Lane:
    """One of the step's packed sequences through all steps.

    Attributes:
        share: how many records of an epoch are this lane's.
        epoch, cursor: the next record to draw.
        met: records drawn, those that could not be used included.
    """

    number: int
    lanes: int
    share: int
    take: Callable[[int, int], Row]
    planner: Planner
    lookahead: int
    epoch: int = 0
    cursor: int = 0
    hand: list[Item] = field(default_factory=list)
    met: int = 0
    bad: list[Bad] = field(default_factory=list)

    def fill(self) -> list[Item]:
        """The items of the next sequence: the oldest at hand, then always the longest that still fits.

        Raises:
            StreamError: not one of the lane's records can be used.
        """
        chosen: list[Item] = []
        room = self.planner.capacity
        while True:
            while len(self.hand) < self.lookahead:
                self.hand.append(self._draw())
            fits = [place for place, item in enumerate(self.hand) if item.length <= room]
            if not fits:
                return chosen
            pick = max(fits, key=lambda place: (self.hand[place].length, -place)) if chosen else 0
            chosen.append(self.hand.pop(pick))
            room -= chosen[-1].length

    def _draw(self) -> Item:
        reason = ""
        # So many draws hold a whole epoch, wherever they begin.
        for _ in range(2 * self.share):
            if self.cursor == self.share:
                self.epoch, self.cursor = self.epoch + 1, 0
            item = self._item(self.epoch, self.cursor)
            self.cursor += 1
            self.met += 1
            if isinstance(item, Item):
                return item
            self.bad.append(item)
            reason = f"{item.id}: {item.reason}, {item.detail}"
        error = StreamError(
            f"data.train: none of the {self.share} records of one lane can be used; the last was {reason}"
        )
        error.bad = self.bad
        raise error

    def _item(self, epoch: int, index: int) -> Item | Bad:
        return self.planner.plan(self.take(epoch, self.number + index * self.lanes), epoch, index)

    @property
    def state(self) -> dict[str, Any]:
        held = [[item.epoch, item.index] for item in self.hand]
        return {"epoch": self.epoch, "cursor": self.cursor, "met": self.met, "hand": held}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor, self.met = state["epoch"], state["cursor"], state["met"]
        items = [self._item(epoch, index) for epoch, index in state["hand"]]
        self.hand = [item for item in items if isinstance(item, Item)]


@dataclass(frozen=True)
class Step:
    """What one step takes from this rank's lanes.

    Attributes:
        batches: a packed sequence of each lane.
        tokens: in them, without padding.
        records: in them.
        thinking: records in them whose response thinks.
        met: records drawn by these lanes since the stream began.
        bad: those found unusable since the step before.
        epochs: mean over the lanes of how often each has gone through its share.
        lanes: the lanes' state after this step, by number.
    """

    batches: list[PackedBatch]
    tokens: int
    records: int
    thinking: int
    met: int
    bad: list[Bad]
    epochs: float
    lanes: dict[str, dict[str, Any]]


def _sound(image: NDArray[np.uint8] | ImageError) -> NDArray[np.uint8]:
    if isinstance(image, ImageError):
        raise image
    return image


class RecordStream:
    """The steps of this rank. A context manager that ends its thread.

    Args:
        lanes: packed sequences of a step over all ranks.
        rank, ranks: of data parallelism.
        seed: of the order.
        prefetch, threads: steps prepared ahead, and threads that decode images: they change no step.
        state: ``Step.lanes`` of all ranks, joined, to go on from.

    Raises:
        ValueError: fewer lanes than ranks, fewer records than lanes, or a state of another number of lanes.
    """

    def __init__(
        self,
        files: RecordFiles,
        planner: Planner,
        *,
        lanes: int,
        seed: int,
        lookahead: int = 16,
        rank: int = 0,
        ranks: int = 1,
        prefetch: int = 0,
        threads: int = 1,
        state: dict[str, Any] | None = None,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        check_lanes(lanes, ranks, files.rows)
        if state is not None and len(state) != lanes:
            raise ValueError(
                f"batch_size: {lanes} packed sequences a step, and the checkpoint has the position of {len(state)}: "
                "go on with as many, or start a new run folder"
            )
        self.planner = planner
        order = Order([group.rows for group in files.groups], seed, window_rows)
        self.windows = _Windows(files, order, lambda position: position % lanes % ranks == rank)
        self.windows.limit += len(range(rank, lanes, ranks)) // 4
        self.lanes = [
            Lane(number, lanes, len(range(number, files.rows, lanes)), self.windows.take, planner, lookahead)
            for number in range(rank, lanes, ranks)
        ]
        self._state = state
        self._queue: queue.Queue[Step | Exception] = queue.Queue(max(prefetch, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if prefetch else None
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> RecordStream:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown()

    def next(self) -> Step:
        """The next step. Whatever hindered the thread is raised here.

        Raises:
            StreamError: not one record of a lane can be used.
            OSError, ValueError: a file that can no longer be read.
        """
        step = self._queue.get() if self._thread is not None else self._make()
        if isinstance(step, Exception):
            raise step
        return step

    def _run(self) -> None:
        while not self._closed.is_set():
            made: Step | Exception
            try:
                made = self._make()
            except Exception as error:
                made = error
            while not self._closed.is_set():
                try:
                    self._queue.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, Exception):
                return

    def _make(self) -> Step:
        if self._state is not None:
            for lane in self.lanes:
                lane.restore(self._state[str(lane.number)])
            self._state = None
        filled = [lane.fill() for lane in self.lanes]
        bad = [found for lane in self.lanes for found in lane.bad]
        for lane in self.lanes:
            lane.bad.clear()
        batches = []
        for batch, damaged in self._pool.map(self.planner.emit, filled):
            batches.append(batch)
            bad += damaged
        items = [item for items in filled for item in items]
        return Step(
            batches,
            tokens=sum(int(batch.layout.offsets[-1]) for batch in batches),
            records=len(items),
            thinking=sum(item.sample.mode is Mode.THINKING for item in items),
            met=sum(lane.met for lane in self.lanes),
            bad=bad,
            epochs=sum(lane.epoch + lane.cursor / lane.share for lane in self.lanes) / len(self.lanes),
            lanes={str(lane.number): lane.state for lane in self.lanes},
        )


def check_lanes(lanes: int, ranks: int, records: int) -> None:
    """ValueError where a step has fewer packed sequences than ranks, or more than there are records."""
    if lanes < ranks:
        raise ValueError(
            f"batch_size = {lanes} packed sequences do not give each of {ranks} data-parallel ranks one: raise it"
        )
    if records < lanes:
        raise ValueError(
            f"data.train holds {records} records, fewer than the {lanes} packed sequences of a step (batch_size): "
            "lower it, or give more"
        )


def joined(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The lanes' state of all ranks in one, in order."""
    whole = {name: lane for part in parts for name, lane in part.items()}
    return dict(sorted(whole.items(), key=lambda pair: int(pair[0])))

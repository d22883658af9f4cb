"""Stages that ask models: many records under way at once, across partitions, results in the order of the records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from r4b_core.curate.client import Background, open_journal
from r4b_core.curate.journal import Journal
from r4b_core.curate.runner import Process
from r4b_core.curate.stage import Outcome
from r4b_core.curate.store import Partition, PartitionWriter, StageError
from r4b_core.data.records import Record, read_records

JOURNAL = "answers.jsonl"
_BATCH = 32
R = TypeVar("R")


class AskStage(ABC, Generic[R]):
    """A stage whose records wait for models.

    Attributes:
        name: of the stage.
        background: where its clients live.
        window: records under way, or done before their turn.
    """

    name: str
    background: Background
    window: int

    @abstractmethod
    async def ask(self, record: Record) -> R:
        """What the models say to a record."""

    @abstractmethod
    def settle(self, asked: Sequence[tuple[Record, R]]) -> Outcome:
        """What becomes of records by what was said to them."""

    def __call__(self, records: Sequence[Record]) -> Outcome:
        """Ask and settle.

        Raises:
            EndpointError, JournalError: when the stage has to stop.
        """
        return self.settle(list(self.background.ordered(self.ask, records, self.window)))


@dataclass(frozen=True)
class AskWork:
    """Such a stage as work of `run_stage`, to be run in one process (``workers=0``): the endpoints do the work.

    Attributes:
        make: opens the stage.
        settings: what ``make`` is given.
        folder: where the journal lies: the stage's output.
        partitions: those to come, in order; while the last records of one are waited for, the next are under way.
    """

    make: Callable[[Any, Background, Journal], AbstractContextManager[AskStage[Any]]]
    settings: Any
    folder: Path
    partitions: tuple[Partition, ...] = ()

    @contextmanager
    def open(self) -> Iterator[Process]:
        with (
            Background() as background,
            open_journal(self.folder / JOURNAL, background) as journal,
            self.make(self.settings, background, journal) as stage,
        ):
            ahead = _Ahead(stage, self.partitions)
            try:
                yield ahead.process
            finally:
                ahead.close()


class _Ahead(Generic[R]):
    """Asks about the records of partitions in order, on into those that nobody has called for yet."""

    def __init__(self, stage: AskStage[R], partitions: Sequence[Partition]) -> None:
        self._stage, self._partitions = stage, list(partitions)
        self._coming: list[Partition] = []
        self._stream: Iterator[tuple[_Item, R | None]] | None = None

    def process(self, partition: Partition, writer: PartitionWriter) -> Iterator[None]:
        """Add what becomes of a partition's records to the writer; yields now and then."""
        if not self._coming or self._coming[0] != partition:
            self.close()
            known = partition in self._partitions
            self._coming = self._partitions[self._partitions.index(partition) :] if known else [partition]
            self._stream = self._stage.background.ordered(self._ask, _items(self._coming), self._stage.window)
        assert self._stream is not None
        batch: list[tuple[Record, R]] = []
        for (record, error), said in self._stream:
            if error is not None:
                raise StageError(str(error)) from error
            if record is None:
                break
            assert said is not None
            batch.append((record, said))
            if len(batch) >= _BATCH:
                writer.add(len(batch), self._stage.settle(batch))
                batch = []
                yield
        writer.add(len(batch), self._stage.settle(batch))
        self._coming = self._coming[1:]

    def close(self) -> None:
        """Ask no more."""
        if isinstance(self._stream, Generator):
            self._stream.close()
        self._stream = None

    async def _ask(self, item: _Item) -> R | None:
        return None if item[0] is None else await self._stage.ask(item[0])


_Item = tuple[Record | None, ValueError | None]
"""A record; or the end of a partition, with the error where it could not be read to its end."""


def _items(partitions: Sequence[Partition]) -> Iterator[_Item]:
    for partition in list(partitions):
        error: ValueError | None = None
        try:
            for record in read_records(partition.path):
                yield record, None
        except ValueError as unreadable:
            error = unreadable
        yield None, error

"""Runs a stage over the partitions of its input: batch by batch, in worker processes, the same bytes however many.

A worker that dies (killed for memory, segmentation fault) costs its partition one more try, not the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from r4b_core.curate.stage import Stage
from r4b_core.curate.store import Partition, PartitionWriter, StageError, StageStore
from r4b_core.data.records import Record, read_records

Process = Callable[[Partition, PartitionWriter], Iterator[None]]
"""Does a partition: adds what became of it to the writer, and yields after every batch."""

Advance = Callable[[int], None]
"""Is told how many records are done, a few at a time."""

TRIES = 2


class Work(Protocol):
    """What is done to every partition. It is pickled, so it holds settings, not open things."""

    def open(self) -> AbstractContextManager[Process]:
        """Open what the work needs, once in each worker process."""
        ...


@dataclass(frozen=True)
class RecordWork:
    """A stage, a pure function over batches of records, as work on partitions of record files.

    Attributes:
        make: opens the stage in the worker process; a function of a module, so that it can be pickled.
        settings: what ``make`` is given.
        batch: records at a time.
    """

    make: Callable[[Any], AbstractContextManager[Stage]]
    settings: Any
    batch: int = 64

    @contextmanager
    def open(self) -> Iterator[Process]:
        with self.make(self.settings) as stage:

            def process(partition: Partition, writer: PartitionWriter) -> Iterator[None]:
                records = _records(partition)
                while batch := list(islice(records, self.batch)):
                    writer.add(len(batch), stage(batch))
                    yield

            yield process


def _records(partition: Partition) -> Iterator[Record]:
    try:
        yield from read_records(partition.path)
    except ValueError as error:
        raise StageError(str(error)) from error


def run_partition(store: StageStore, partition: Partition, process: Process, advance: Advance) -> None:
    """Do one partition and publish it."""
    with store.write(partition) as writer:
        told = 0
        for _ in process(partition, writer):
            advance(writer.counts.read - told)
            told = writer.counts.read
        rest = writer.counts.read - told
    advance(rest)


def run_stage(store: StageStore, work: Work, workers: int | None = None, advance: Advance = lambda n: None) -> None:
    """Do every partition of the store that is not finished.

    Args:
        workers: processes; None: one per core; 0: none, all in this process.

    Raises:
        StageError: the disk is full, the input cannot be read, or a worker died twice over the same partition.
    """
    pending = store.pending()
    if not pending:
        return
    if workers == 0:
        with work.open() as process:
            for partition in pending:
                run_partition(store, partition, process, advance)
        return
    _Pool(store, work, min(workers or os.cpu_count() or 1, len(pending)), advance).run(pending)


class _Worker:
    """A process that does one partition at a time."""

    def __init__(self, store: StageStore, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, store, work), daemon=True)
        self.process.start()
        theirs.close()
        self.partition: Partition | None = None

    def give(self, partition: Partition) -> None:
        self.partition = partition
        try:
            self.connection.send(partition)
        except OSError:  # it died while idle: the pool hears of it by the connection's end
            pass

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class _Pool:
    def __init__(self, store: StageStore, work: Work, size: int, advance: Advance) -> None:
        self._store, self._work, self._size, self._advance = store, work, size, advance
        self._workers: list[_Worker] = []
        self._deaths: dict[int, int] = {}

    def run(self, pending: list[Partition]) -> None:
        queue = deque(pending)
        try:
            while queue or any(worker.partition for worker in self._workers):
                while queue and len(self._workers) < self._size:
                    self._workers.append(_Worker(self._store, self._work))
                for worker in self._workers:
                    if queue and worker.partition is None:
                        worker.give(queue.popleft())
                for worker in self._heard_from():
                    if (again := self._listen(worker)) is not None:
                        queue.appendleft(again)
        finally:
            for worker in self._workers:
                worker.stop()

    def _heard_from(self) -> list[_Worker]:
        ready = wait([worker.connection for worker in self._workers])
        return [worker for worker in self._workers if worker.connection in ready]

    def _listen(self, worker: _Worker) -> Partition | None:
        """Take one message; returns a partition that must be done again."""
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if kind == "advance":
            self._advance(value)
        elif kind == "finished":
            worker.partition = None
        elif kind == "refused":
            raise StageError(value)
        else:
            raise RuntimeError(f"a worker of {self._store.stage} failed:\n{value}")
        return None

    def _bury(self, worker: _Worker) -> Partition | None:
        worker.process.join()
        self._workers.remove(worker)
        worker.stop()
        partition = worker.partition
        if partition is None:
            return None
        deaths = self._deaths[partition.index] = self._deaths.get(partition.index, 0) + 1
        if deaths >= TRIES:
            raise StageError(
                f"{self._store.folder}: the worker of {partition.name} ({partition.path}) died {deaths} times "
                f"({_cause(worker.process.exitcode)}); finished partitions are safe: set fewer workers or give the "
                "machine more memory, and run the same command again"
            )
        return partition


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as when memory runs out" if -code == signal.SIGKILL else name


def _serve(connection: Connection, store: StageStore, work: Work) -> None:
    """A worker's life: takes partitions until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        with work.open() as process:
            while True:
                partition = connection.recv()
                run_partition(store, partition, process, lambda n: connection.send(("advance", n)))
                connection.send(("finished", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except StageError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("broke", traceback.format_exc()))

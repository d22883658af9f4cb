"""The stage as a whole: clean every partition, find repetitions over all of them, write what is left.

Cleaned records and their signatures wait in ``clean/`` until the last partition is written. Each of the two passes can
be killed anywhere and goes on; the resolution between them takes seconds and is done again.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from r4b_core.curate.runner import Advance, Process, Work
from r4b_core.curate.stage import Drop, Outcome
from r4b_core.curate.standardize import text
from r4b_core.curate.standardize.clean import Cleaner
from r4b_core.curate.standardize.decontaminate import Benchmarks
from r4b_core.curate.standardize.duplicates import DECISION, KEPT, REASONS, SAME_KEY, find_duplicates
from r4b_core.curate.standardize.pictures import Picture, check_picture
from r4b_core.curate.standardize.plan import plan_inputs
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.standardize.signatures import SIGNATURE
from r4b_core.curate.store import (
    Counts,
    Partition,
    PartitionWriter,
    StageError,
    StageStore,
    open_stage,
    read_dropped,
)
from r4b_core.data.images import ImageError
from r4b_core.data.records import Record, read_records

BATCH = 64
SIGNATURES = ".signatures.npy"
Run = Callable[[StageStore, Work, Advance], None]
"""Does the partitions of a store: here or on Ray."""


class Rewriter(Protocol):
    """Cleans questions by a language model (`r4b_core.curate.standardize.rewrite`)."""

    @property
    def content(self) -> dict[str, Any]:
        """What its output depends on."""
        ...

    def __call__(self, source: Path, target: Path, journal: Path) -> None:
        """From a folder of records to another; replies that were paid for stay in the folder ``journal``."""


def standardize(
    folder: str | Path,
    inputs: Sequence[InputSettings],
    settings: StandardizeSettings,
    run: Run,
    advance: Advance = lambda n: None,
    *,
    rewriter: Rewriter | None = None,
    force: bool = False,
) -> Counts:
    """Read, clean and deduplicate the inputs into records.

    Args:
        folder: the stage's output.
        run: does the partitions of a store with a work.
        rewriter: cleans by a language model what the rules left.

    Raises:
        StageError: an input cannot be found or told, a benchmark cannot be read whole, or see `open_stage`.
    """
    folder = Path(folder)
    partitions = plan_inputs(inputs, settings)
    benchmarks = plan_inputs(settings.decontaminate.files, settings) if settings.decontaminate.files else []
    asked = {
        **settings.model_dump(mode="json"),
        "benchmarks": [partition.made_from for partition in benchmarks],
        "rewrite": rewriter.content if rewriter else None,
    }
    clean_folder = folder / "clean"
    with open_stage(folder, "standardize", asked, partitions, force=force) as store:
        if store.pending():
            with open_stage(clean_folder, "clean", asked, partitions, force=force) as cleaned:
                index = None
                if benchmarks:
                    index = clean_folder / "benchmarks.npz"
                    read_benchmarks(benchmarks, settings).save(index)
                work: Work = CleanWork(settings, index)
                if rewriter is not None:
                    work = _rewritten(folder, partitions, asked, settings, index, rewriter, run, advance, force)
                    advance = _silent
                run(cleaned, work, advance)
            files = [clean_folder / f"{partition.name}{SIGNATURES}" for partition in partitions]
            for partition, decisions in zip(partitions, find_duplicates(files, settings.duplicates), strict=True):
                np.save(clean_folder / f"{partition.name}.decisions.npy", decisions)
            run(store, FilterWork(clean_folder, tuple(Path(p.path).name for p in partitions)), _silent)
        for done in (clean_folder, folder / "read", folder / "rewritten"):
            shutil.rmtree(done, ignore_errors=True)
        return store.counts()


def _rewritten(
    folder: Path,
    partitions: Sequence[Partition],
    asked: dict[str, Any],
    settings: StandardizeSettings,
    index: Path | None,
    rewriter: Rewriter,
    run: Run,
    advance: Advance,
    force: bool,
) -> Work:
    """Read leniently and rewrite; what is left to do is to look again at what came of it."""
    source, target = folder / "read", folder / "rewritten"
    with open_stage(source, "read", asked, partitions, force=force) as store:
        run(store, CleanWork(settings, None, lenient=True), advance)
    if force:
        shutil.rmtree(target, ignore_errors=True)  # the replies lie elsewhere
    rewriter(source, target, folder)
    return LookAgainWork(settings, index, source, target)


def _silent(count: int) -> None:
    """An `Advance` for what was counted before."""


def read_benchmarks(partitions: Sequence[Partition], settings: StandardizeSettings) -> Benchmarks:
    """What the benchmark files hold.

    Raises:
        StageError: if one of their rows cannot be read: what it holds would not be kept out.
    """
    cleaner = Cleaner(settings)

    def questions() -> Iterator[tuple[list[str], list[Picture]]]:
        limits = dict(max_pixels=settings.max_image_pixels, max_bytes=settings.max_image_bytes)
        for partition in partitions:
            for row, made in cleaner.rows(partition):
                if isinstance(made, Drop):
                    raise StageError(f"{partition.path}: row {row} of this benchmark: {made.reason} ({made.detail})")
                try:
                    pictures = [check_picture(data, max_side=settings.max_side, **limits) for data in made.images]
                except ImageError as error:
                    raise StageError(f"{partition.path}: row {row} of this benchmark: {error}") from error
                yield text.words(text.clean(made.question, settings.rules)), pictures

    return Benchmarks.build(questions(), settings.decontaminate)


@dataclass(frozen=True)
class CleanWork:
    """The first pass: rows to clean records, with signatures beside them."""

    settings: StandardizeSettings
    benchmarks: Path | None
    lenient: bool = False

    @contextmanager
    def open(self) -> Iterator[Process]:
        cleaner = _cleaner(self.settings, self.benchmarks, self.lenient)
        yield lambda partition, writer: _clean(cleaner, cleaner.rows(partition), writer)


@dataclass(frozen=True)
class LookAgainWork:
    """The first pass after rewriting: the same rules over what a language model made of the questions.

    Attributes:
        source, target: the folders before and after rewriting; what they let go is carried along.
    """

    settings: StandardizeSettings
    benchmarks: Path | None
    source: Path
    target: Path

    @contextmanager
    def open(self) -> Iterator[Process]:
        cleaner = _cleaner(self.settings, self.benchmarks)

        def rows(name: str) -> Iterator[tuple[int, Record | Drop]]:
            for folder in (self.source, self.target):
                for drop in read_dropped(folder / f"{name}.dropped.jsonl"):
                    yield drop.row, drop
            for record in read_records(self.target / f"{name}.parquet"):
                yield int(record.provenance["row"]), record

        yield lambda partition, writer: _clean(cleaner, rows(partition.name), writer)


def _cleaner(settings: StandardizeSettings, benchmarks: Path | None, lenient: bool = False) -> Cleaner:
    return Cleaner(settings, Benchmarks.load(benchmarks) if benchmarks else None, lenient)


def _clean(cleaner: Cleaner, rows: Iterator[tuple[int, Record | Drop]], writer: PartitionWriter) -> Iterator[None]:
    """Clean rows in batches, and publish their signatures with them."""
    signatures = [np.zeros(0, SIGNATURE)]
    while batch := list(islice(rows, BATCH)):
        outcome, found = clean_batch(cleaner, batch)
        signatures.append(found)
        writer.add(len(batch), outcome)
        yield
    file = io.BytesIO()
    np.save(file, np.concatenate(signatures))
    writer.attach(SIGNATURES, file.getvalue())


def clean_batch(cleaner: Cleaner, batch: Sequence[tuple[int, Record | Drop]]) -> tuple[Outcome, np.ndarray]:
    """What becomes of rows that were read, and the signatures of those kept."""
    outcome, signatures = Outcome(), []
    for row, made in batch:
        cleaned = made if isinstance(made, Drop) else cleaner.clean(made, row)
        if isinstance(cleaned, Drop):
            outcome.dropped.append(cleaned)
        else:
            outcome.kept.append(cleaned[0])
            signatures.append(cleaned[1])
    return outcome, np.array(signatures, SIGNATURE)


@dataclass(frozen=True)
class FilterWork:
    """The second pass: clean records without those that repeat an earlier one.

    Attributes:
        folder: of the first pass.
        files: the name of each partition's file of origin.
    """

    folder: Path
    files: tuple[str, ...]

    @contextmanager
    def open(self) -> Iterator[Process]:
        yield self._process

    def _process(self, partition: Partition, writer: PartitionWriter) -> Iterator[None]:
        drops = read_dropped(self.folder / f"{partition.name}.dropped.jsonl")
        while dropped := list(islice(drops, BATCH)):
            writer.add(len(dropped), Outcome(dropped=dropped))
        decisions = np.load(self.folder / f"{partition.name}.decisions.npy")
        if decisions.dtype != DECISION:
            raise StageError(f"{self.folder}: is damaged: give --force to do the stage again")
        records = read_records(self.folder / f"{partition.name}.parquet")
        for start in range(0, len(decisions), BATCH):
            batch = list(islice(records, min(BATCH, len(decisions) - start)))
            outcome = Outcome()
            for record, decision in zip(batch, decisions[start:], strict=False):
                self._judge(record, decision, outcome)
            writer.add(len(batch), outcome)
            yield

    def _judge(self, record: Record, decision: Any, outcome: Outcome) -> None:
        code = int(decision["code"])
        if code == KEPT:
            outcome.kept.append(record)
            return
        earlier = f"as row {decision['row']} of {self.files[int(decision['partition'])]}"
        file, row = record.provenance["file"], int(record.provenance["row"])
        outcome.dropped.append(Drop(record.id, record.source, REASONS[code], earlier, code == SAME_KEY, file, row))

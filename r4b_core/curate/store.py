"""A stage's output folder: one Parquet file of records per partition of its input, each complete or absent.

============================  ======================================================================================
``part-00000.parquet``        the records kept (r4b_core/data/records.py)
``part-00000.dropped.jsonl``  one line {id, source, reason, detail, quarantined, file, row} per record let go
``part-00000.json``           counts, and what the partition was made from and with; published last: where it is, the
                              partition is finished
``stage.json``                the stage, its settings and the partitions of its input
============================  ======================================================================================

A stage that is started again does the partitions that are not finished. Over other settings or a changed input it
refuses to go on, because the folder would then mix two answers.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from r4b_core.config.load import fingerprint
from r4b_core.curate.stage import Drop, Outcome
from r4b_core.data.records import SCHEMA, Record, read_records, to_table

FORMAT = 1
STAGE_FILE = "stage.json"
ROW_GROUP_RECORDS = 256
ROW_GROUP_BYTES = 64 * 2**20
# Encoded pictures do not get smaller, and texts hardly repeat: to try costs more than all the rest of the writing.
_COMPRESSION = {name: "zstd" for name in SCHEMA.names if name != "images"}
_REPETITIVE = ["source", "finish_reason", "verdict", "verdict_reason", "mode"]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StageError(ValueError):
    """A stage that cannot start or go on; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A piece of a stage's input: a file, or a part of one.

    Attributes:
        index: its place in the input, and the number of its output file.
        path: the file.
        identity: of the file: name, bytes and content digest, or time of change.
        piece: which part of the file, in the words of whoever reads it; empty for all of it.
    """

    index: int
    path: str
    identity: dict[str, Any]
    piece: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}"

    @property
    def made_from(self) -> dict[str, Any]:
        """What its output depends on, as the sidecar keeps it."""
        return {**self.identity, **self.piece}


def identify(path: str | Path) -> dict[str, Any]:
    """What tells a file from a changed one: the digest that its own sidecar holds, else its time of change.

    Raises:
        StageError: if the file does not have the size that its sidecar says.
    """
    path = Path(path)
    status = path.stat()
    sidecar = path.with_suffix(".json")
    if path.suffix == ".parquet" and sidecar.is_file() and (path.parent / STAGE_FILE).is_file():
        written = _read_json(sidecar).get("output", {})
        if written.get("bytes") != status.st_size:
            raise StageError(
                f"{path}: has {status.st_size} bytes, {sidecar.name} says {written.get('bytes')}: the file was changed "
                "or cut; run the stage that made it again with --force"
            )
        return {"name": path.name, "bytes": status.st_size, "digest": written["digest"]}
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def record_files(folder: str | Path) -> list[Path]:
    """The record files of a folder, in order: of a stage's output once it is finished, else every Parquet file.

    Raises:
        StageError: if there are none, or the stage is not finished.
    """
    folder = Path(folder)
    if (folder / STAGE_FILE).is_file():
        stage = _read_json(folder / STAGE_FILE)
        names = [f"part-{index:05d}" for index in range(len(stage["partitions"]))]
        missing = [name for name in names if not (folder / f"{name}.json").is_file()]
        if missing:
            raise StageError(
                f"{folder}: {len(names) - len(missing)} of {len(names)} partitions are finished: "
                f"run `r4b curate {stage['stage']}` again, it goes on where it stopped"
            )
        return [folder / f"{name}.parquet" for name in names]
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    if not files:
        raise StageError(f"{folder}: holds no records; run the stage before this one first, or name another folder")
    return files


def partitions_of(folder: str | Path, first: int = 0) -> list[Partition]:
    """The record files of a folder as the partitions of the next stage, numbered from ``first``."""
    return [Partition(first + i, str(path), identify(path)) for i, path in enumerate(record_files(folder))]


@dataclass(slots=True)
class Counts:
    """What became of records. ``read`` = kept + dropped + quarantined, always.

    Attributes:
        read: how many went in.
        kept: how many went on, by source.
        dropped: let go by a rule, by (source, reason).
        quarantined: could not be used, by (source, reason).
    """

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    quarantined: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, read: int, outcome: Outcome) -> None:
        """Count a batch of ``read`` records and what became of them."""
        if read != len(outcome.kept) + len(outcome.dropped):
            raise AssertionError(
                f"a stage took {read} records, kept {len(outcome.kept)} and dropped {len(outcome.dropped)}: "
                f"{read - len(outcome.kept) - len(outcome.dropped)} are unaccounted for"
            )
        self.read += read
        self.kept.update(record.source for record in outcome.kept)
        for drop in outcome.dropped:
            (self.quarantined if drop.quarantined else self.dropped)[drop.source, drop.reason] += 1

    def merge(self, other: Counts) -> None:
        self.read += other.read
        self.kept += other.kept
        self.dropped += other.dropped
        self.quarantined += other.quarantined

    @property
    def num_kept(self) -> int:
        return self.kept.total()

    def to_json(self) -> dict[str, Any]:
        def table(counter: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
            return [{"source": s, "reason": r, "count": n} for (s, r), n in sorted(counter.items())]

        return {
            "in": self.read,
            "kept": self.num_kept,
            "kept_by_source": dict(sorted(self.kept.items())),
            "dropped": table(self.dropped),
            "quarantined": table(self.quarantined),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        def counter(rows: Sequence[Mapping[str, Any]]) -> Counter[tuple[str, str]]:
            return Counter({(row["source"], row["reason"]): row["count"] for row in rows})

        return cls(data["in"], Counter(data["kept_by_source"]), counter(data["dropped"]), counter(data["quarantined"]))


class PartitionWriter:
    """Writes one partition aside and publishes it. Where batches end leaves no trace in the bytes."""

    def __init__(self, folder: Path, partition: Partition, fingerprint: str) -> None:
        self.counts = Counts()
        self._folder = folder
        self._partition = partition
        self._fingerprint = fingerprint
        # A name of its own: the worker of a run that was killed may still be writing this partition.
        own = f"{os.getpid()}-{os.urandom(4).hex()}"
        suffixes = (".parquet", ".dropped.jsonl")
        self._aside = {suffix: folder / f".{partition.name}{suffix}.{own}.tmp" for suffix in suffixes}
        self._attached: dict[str, bytes] = {}
        self._waiting: list[Record] = []
        self._waiting_bytes = 0
        self._written = 0
        self._open = ExitStack()
        try:
            self._records, self._dropped = (self._open.enter_context(_create(path)) for path in self._aside.values())
            self._parquet = self._open.enter_context(
                pq.ParquetWriter(self._records, SCHEMA, compression=_COMPRESSION, use_dictionary=_REPETITIVE)
            )
        except BaseException:
            self.abort()
            raise

    def add(self, read: int, outcome: Outcome) -> None:
        """Take ``read`` records of the input as done: what was kept, in order, and what was let go."""
        self.counts.add(read, outcome)
        for record in outcome.kept:
            self._waiting.append(record)
            self._waiting_bytes += sum(map(len, record.images)) + len(record.response or "") + len(record.question)
            if len(self._waiting) >= ROW_GROUP_RECORDS or self._waiting_bytes >= ROW_GROUP_BYTES:
                self._flush()
        for drop in outcome.dropped:
            self._dropped.write(_line(drop))

    def attach(self, suffix: str, data: bytes) -> None:
        """Publish one more file with the partition: ``part-00000SUFFIX``."""
        self._attached[suffix] = data

    def commit(self) -> None:
        """Make everything durable and publish it, the sidecar last."""
        self._flush()
        if self._written != self.counts.num_kept:
            raise AssertionError(f"{self._written} records were written, {self.counts.num_kept} were kept")
        self._parquet.close()
        for file in (self._records, self._dropped):
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        output = {"bytes": self._aside[".parquet"].stat().st_size, "digest": digest(self._aside[".parquet"])}
        for suffix, aside in self._aside.items():
            os.replace(aside, self._folder / f"{self._partition.name}{suffix}")
        for suffix, data in self._attached.items():
            write_whole(self._folder / f"{self._partition.name}{suffix}", data)
        _sync_folder(self._folder)
        sidecar = {
            "format": FORMAT,
            "counts": self.counts.to_json(),
            "made_from": self._partition.made_from,
            "fingerprint": self._fingerprint,
            "output": output,
        }
        write_whole(self._folder / f"{self._partition.name}.json", json.dumps(sidecar, indent=1, ensure_ascii=False))

    def abort(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError, ValueError):  # the disk is full: closing flushes, and fails as the write did
            self._open.close()
        for aside in self._aside.values():
            aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._waiting:
            self._parquet.write_table(to_table(self._waiting))
            self._written += len(self._waiting)
            self._waiting, self._waiting_bytes = [], 0


@dataclass(frozen=True)
class StageStore:
    """A stage's output folder, open for one run; `open_stage` makes it. It can be sent to other processes.

    Attributes:
        folder: where the output goes.
        stage: the stage's name.
        fingerprint: of its settings.
        partitions: of its input, all of them.
    """

    folder: Path
    stage: str
    fingerprint: str
    partitions: tuple[Partition, ...]

    def is_finished(self, partition: Partition) -> bool:
        return (self.folder / f"{partition.name}.json").is_file()

    def pending(self) -> list[Partition]:
        """The partitions still to be done, in order."""
        return [partition for partition in self.partitions if not self.is_finished(partition)]

    @contextmanager
    def write(self, partition: Partition) -> Iterator[PartitionWriter]:
        """A writer that publishes the partition at the end of the block, and leaves nothing where the block fails.

        Raises:
            StageError: the disk is full.
        """
        writer = None
        try:
            writer = PartitionWriter(self.folder, partition, self.fingerprint)
            yield writer
            writer.commit()
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise StageError(
                f"{self.folder}: no room left for {partition.name} ({error.strerror}); finished partitions are safe: "
                "free some space and run the same command again"
            ) from error
        finally:
            if writer is not None:
                writer.abort()

    def read(self, partition: Partition) -> Iterator[Record]:
        """The records of a finished partition."""
        return read_records(self.folder / f"{partition.name}.parquet")

    def counts(self) -> Counts:
        """Of all finished partitions together."""
        return folder_counts(self.folder)


@contextmanager
def open_stage(
    folder: str | Path,
    stage: str,
    settings: Mapping[str, Any],
    partitions: Sequence[Partition],
    *,
    force: bool = False,
) -> Iterator[StageStore]:
    """Open a stage's output folder, alone, and compare it with what was asked for.

    Args:
        settings: everything that the output depends on besides the input, as JSON can hold it.
        partitions: of the input, all of them.
        force: do everything again instead of refusing where settings or input changed.

    Raises:
        StageError: another run is at work here, or the folder was made with other settings or from another input;
            names what changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        wanted = {
            "format": FORMAT,
            "stage": stage,
            "settings": json.loads(json.dumps(settings)),
            "partitions": [partition.made_from for partition in partitions],
        }
        if force:
            _clear(folder)
        elif (folder / STAGE_FILE).is_file():
            _compare(folder, _read_json(folder / STAGE_FILE), wanted)
        _sweep(folder)
        store = StageStore(folder, stage, fingerprint(wanted["settings"]), tuple(partitions))
        for partition in store.partitions:
            if store.is_finished(partition):
                _check_sidecar(folder / f"{partition.name}.json", partition, store.fingerprint)
        write_whole(folder / STAGE_FILE, json.dumps(wanted, indent=1, ensure_ascii=False))
        try:
            yield store
        finally:
            _sweep(folder)


def folder_counts(folder: str | Path) -> Counts:
    """The counts of a stage's folder, over its finished partitions."""
    total = Counts()
    for path in sorted(Path(folder).glob("part-*.json")):
        total.merge(Counts.from_json(_read_json(path)["counts"]))
    return total


def dropped_rows(folder: str | Path) -> Iterator[Drop]:
    """Every record that a stage let go, in order."""
    for path in sorted(Path(folder).glob("part-*.dropped.jsonl")):
        yield from read_dropped(path)


def read_dropped(path: Path) -> Iterator[Drop]:
    """The records that a partition let go, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Drop(**json.loads(line))


def digest(path: Path) -> str:
    """32 hex digits that change with a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when a process dies."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{folder}: another run is at work here; wait for it or name another folder") from None
        yield


def _clear(folder: Path) -> None:
    """Remove a stage's output, the marks of being finished first."""
    (folder / STAGE_FILE).unlink(missing_ok=True)
    for pattern in ("part-*.json", "part-*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left."""
    for pattern in (".part-*.tmp", f".{STAGE_FILE}.*.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _compare(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    way_out = "give --force to do the stage again, or name a new folder"
    if was.get("format") != now["format"] or was.get("stage") != now["stage"]:
        raise StageError(
            f"{folder}: holds the output of `{was.get('stage')}` (format {was.get('format')}), not of `{now['stage']}` "
            f"(format {now['format']}): {way_out}"
        )
    if changes := _changes(was["settings"], now["settings"]):
        raise StageError(f"{folder}: was made with other settings: {'; '.join(changes)}: {way_out}")
    before, after = was["partitions"], now["partitions"]
    if before == after:
        return
    if len(before) != len(after):
        raise StageError(f"{folder}: the input had {len(before)} partitions, it now has {len(after)}: {way_out}")
    changed = [_changed_input(old, new) for old, new in zip(before, after, strict=True) if old != new]
    raise StageError(f"{folder}: the input changed: {'; '.join(changed[:3])}: {way_out}")


def _check_sidecar(path: Path, partition: Partition, settings: str) -> None:
    sidecar = _read_json(path)
    if sidecar.get("fingerprint") != settings or sidecar.get("made_from") != partition.made_from:
        raise StageError(
            f"{path}: does not belong to this run (other settings or input): give --force to do the stage again"
        )


def _changes(was: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two trees of settings, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [*was, *(name for name in now if name not in was)]
        return [
            change
            for name in names
            for change in _changes(was.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if was == now else [f"{key} was {_show(was)}, is {_show(now)}"]


def _changed_input(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old["name"] != new["name"]:
        return f"{new['name']} stands where {old['name']} was"
    return f"{new['name']} ({', '.join(_changes(old, new))})"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(drop: Drop) -> bytes:
    # Text from broken rows may hold lone surrogates, which are no UTF-8.
    return json.dumps(asdict(drop), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _create(path: Path) -> BinaryIO:
    return path.open("wb")


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file aside, sync it, rename it, and sync its folder."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _create(aside) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path}: is damaged ({error}): give --force to do the stage again") from error
    if not isinstance(data, dict):
        raise StageError(f"{path}: is damaged (no JSON object): give --force to do the stage again")
    return data

"""Files of records as training reads them: Parquet that the data engine wrote, or JSONL of the same fields.

Nothing but footers (and where the lines of a JSONL file begin) is held in memory; rows are read group by group.
"""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from r4b_core.data.records import TEACHER_IDS, TEACHER_LOGPROBS, Record, Teacher

NEEDED = ("id", "source", "question", "images")
USED = (*NEEDED, "answer", "response", "finish_reason", "tries", "right", "mode")
TEACHER = (TEACHER_IDS, TEACHER_LOGPROBS)
RATES = ("tries", "right", "answer", "source")
_LINES = 256
_BATCH_ROWS = 32
_MAX_GROUP_BYTES = 2 * 2**30

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """A row group: ``rows`` rows of file number ``file``, the ``number``-th group in it."""

    file: int
    number: int
    rows: int


class RecordFile(Protocol):
    """One file: its groups' rows, the columns that it has, and what tells it from others."""

    path: Path
    group_rows: list[int]
    columns: frozenset[str]
    digest: str

    def read(self, group: int, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a group in order, few in memory at a time."""
        ...


class RecordFiles:
    """The files that a setting names, checked before anything is launched.

    Attributes:
        groups: all row groups, file by file.
        rows: how many records there are.
        fingerprint: changes with the files' names, sizes, rows and footers.
    """

    def __init__(self, patterns: Sequence[str], setting: str, needed: Iterable[str] = ()) -> None:
        """
        Args:
            patterns: files and globs.
            setting: the recipe's name for them, for errors.
            needed: columns that must be there beside ``NEEDED``.

        Raises:
            ValueError: a pattern that matches nothing, or a file that cannot be read or lacks a column.
        """
        self.files: list[RecordFile] = [_open(path, setting) for path in find_files(patterns, setting)]
        for file in self.files:
            if missing := [name for name in (*NEEDED, *needed) if name not in file.columns]:
                raise ValueError(
                    f"{setting}: {file.path} lacks the columns {', '.join(missing)}: bring it in with `r4b curate "
                    "standardize`, and give it responses with the stages after that"
                )
        self.groups = [
            Group(index, number, rows)
            for index, file in enumerate(self.files)
            for number, rows in enumerate(file.group_rows)
            if rows
        ]
        self.rows = sum(group.rows for group in self.groups)
        if not self.rows:
            raise ValueError(f"{setting}: the {len(self.files)} files hold no record")

    @cached_property
    def fingerprint(self) -> str:
        facts = [(file.path.name, sum(file.group_rows), file.digest) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def has(self, *columns: str) -> bool:
        """Do all files have the columns?"""
        return all(file.columns.issuperset(columns) for file in self.files)

    def read(self, group: int, rows: NDArray[np.int64], columns: Sequence[str] = USED) -> dict[int, Row]:
        """The given rows of a group (of those columns that the file has) by their number."""
        where = self.groups[group]
        file = self.files[where.file]
        wanted, last = set(rows.tolist()), int(rows.max(initial=-1))
        found = {}
        for number, row in enumerate(file.read(where.number, [name for name in columns if name in file.columns])):
            if number in wanted:
                found[number] = row
            if number == last:
                break
        return found

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, Row]]:
        """(group, row, values of the columns) of every record in order; for columns that are cheap to read."""
        for index, where in enumerate(self.groups):
            file = self.files[where.file]
            rows = file.read(where.number, [name for name in columns if name in file.columns])
            yield from ((index, number, row) for number, row in enumerate(rows))


def find_files(patterns: Sequence[str], setting: str) -> list[Path]:
    """The files that patterns name, each once, in the order of the patterns and sorted within each.

    Raises:
        ValueError: a pattern matches no file, or a file is neither Parquet nor JSONL.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        # A name may hold characters that are a glob's.
        paths = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [path for path in paths if path.is_file()]
        if not files:
            hint = f"; to take all of a folder: {pattern.rstrip('/')}/*.parquet" if Path(pattern).is_dir() else ""
            raise ValueError(f"{setting}: {pattern!r} matches no file (from {Path.cwd()}){hint}")
        found |= dict.fromkeys(files)
    if strange := [path for path in found if path.suffix.lower() not in _READERS]:
        raise ValueError(f"{setting}: {strange[0]} is neither .parquet nor .jsonl: `r4b curate standardize` reads more")
    return list(found)


def record_of(row: Row) -> Record:
    """The record of a row that was read with ``USED``.

    Images are bytes, empty where there are none to be had. A value of another type than the field's is as good as none.
    """
    images = [image.get("bytes") or b"" if isinstance(image, dict) else b"" for image in row["images"] or ()]
    texts = {name: row.get(name) for name in ("question", "response", "finish_reason", "mode")}
    counts = {name: row.get(name) for name in ("tries", "right")}
    answer = row.get("answer")
    return Record(
        id=str(row["id"]),
        source=str(row["source"] or "unknown"),
        images=images,
        answer=str(answer) if isinstance(answer, str | int | float) else None,
        **{name: value if isinstance(value, str) else None for name, value in texts.items()},  # type: ignore[arg-type]
        **{name: value if isinstance(value, int) else None for name, value in counts.items()},  # type: ignore[arg-type]
    )


def teacher_of(row: Row) -> Teacher | None:
    """What a teacher said at each token of the response, where the row has it."""
    ids, logprobs = row.get(TEACHER_IDS), row.get(TEACHER_LOGPROBS)
    return None if ids is None or logprobs is None else Teacher(ids, logprobs)


def _open(path: Path, setting: str) -> RecordFile:
    try:
        return _READERS[path.suffix.lower()](path)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{setting}: {path} cannot be read ({error}): write it again, or leave it out") from error


class _Parquet:
    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
        groups = [self._metadata.row_group(index) for index in range(self._metadata.num_row_groups)]
        self.group_rows = [group.num_rows for group in groups]
        self.columns = frozenset(schema.names)
        if "images" in schema.names and not _holds_images(schema.field("images").type):
            raise ValueError(f"images is {schema.field('images').type}, not a list of structs with bytes")
        if large := [index for index, group in enumerate(groups) if group.total_byte_size > _MAX_GROUP_BYTES]:
            raise ValueError(
                f"row group {large[0]} has {groups[large[0]].total_byte_size / 2**30:.1f} GiB; with more than "
                f"{_MAX_GROUP_BYTES >> 30} it cannot be streamed: write it with smaller row groups"
            )
        self.digest = _digest(path.stat().st_size, str(schema), [group.total_byte_size for group in groups])

    def read(self, group: int, columns: Sequence[str]) -> Iterator[Row]:
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns)):
                yield from _rows(batch)


class _JsonLines:
    """One JSON object a line. An image is base64 text in ``{"bytes": ...}``, or the name of a file beside this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, end = [], 0
        with path.open("rb") as file:
            first = file.readline()
            file.seek(0)
            for line in file:
                if line.strip():
                    starts.append(end)
                end += len(line)
        self._starts = np.array([*starts, end])
        count = len(starts)
        self.group_rows = [min(_LINES, count - start) for start in range(0, count, _LINES)]
        self.columns = frozenset(json.loads(first) if count else ())
        self.digest = _digest(end, sorted(self.columns))

    def read(self, group: int, columns: Sequence[str]) -> Iterator[Row]:
        first = group * _LINES
        with self.path.open("rb") as file:
            for start, stop in zip(self._starts[first:], self._starts[first + 1 : first + _LINES + 1], strict=False):
                file.seek(start)
                yield self._row(file.read(stop - start), columns)

    def _row(self, line: bytes, columns: Sequence[str]) -> Row:
        """A line that is no JSON object becomes a row without an id, which goes to quarantine."""
        try:
            values = json.loads(line)
            row = {name: values.get(name) for name in columns}
            if "images" in row:
                images = row["images"] if isinstance(row["images"], list) else []
                row["images"] = [{"bytes": self._image(image)} for image in images]
        except (ValueError, AttributeError, TypeError, RecursionError):
            return dict.fromkeys(columns)
        return row

    def _image(self, image: Any) -> bytes:
        """The encoded bytes, empty where there are none to be had."""
        try:
            if isinstance(image, dict):
                return base64.b64decode(image["bytes"], validate=True)
            folder = self.path.parent.resolve()
            file = (folder / image).resolve()
            return file.read_bytes() if file.is_relative_to(folder) else b""
        except (OSError, KeyError, TypeError, binascii.Error):
            return b""


_READERS: dict[str, Callable[[Path], RecordFile]] = {".parquet": _Parquet, ".jsonl": _JsonLines}


def _rows(batch: pa.RecordBatch) -> list[Row]:
    """The batch's rows; a text that is not UTF-8 becomes None."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        names = batch.schema.names
        return [{name: _value(batch.column(name)[row]) for name in names} for row in range(batch.num_rows)]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _holds_images(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    names = [kind.value_type.field(index).name for index in range(kind.value_type.num_fields)]
    return "bytes" in names


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

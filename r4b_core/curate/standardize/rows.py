"""Rows out of Parquet, JSON Lines and JSON files that may be broken anywhere: each row, or the reason why not.

A file is read in pieces, so that many processes can share it. A piece is planned without parsing what it holds: by
Parquet's row groups, or by the byte at which a JSON row begins.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".json")
BATCH_BYTES = 32 * 2**20
BATCH_ROWS = 256
CHUNK = 2**20
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be read: a short constant reason, and what exactly."""

    reason: str
    detail: str = ""


Row = tuple[int, dict[str, Any] | Bad]
"""(number of the row in its file, its columns or why there are none)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``start + rows`` of a file; ``offset`` is their first byte, or their first row group."""

    start: int
    rows: int
    offset: int = 0
    groups: int = 0


def plan_pieces(path: Path, rows: int, max_row_bytes: int) -> list[Piece]:
    """The pieces of a file, of at most ``rows`` rows each (a Parquet row group stays whole). A file that cannot be
    opened at all is one piece, so that it is counted."""
    if path.suffix == ".parquet":
        return _plan_parquet(path, rows)
    with path.open("rb") as file:
        starts = [offset for _, offset, _ in _json_spans(file, path.suffix, max_row_bytes, keep=False)]
    if not starts:
        return [Piece(0, 1)] if path.stat().st_size else []
    return [Piece(i, min(rows, len(starts) - i), starts[i]) for i in range(0, len(starts), rows)]


def read_rows(path: Path, piece: Piece, columns: frozenset[str], max_row_bytes: int) -> Iterator[Row]:
    """The rows of a piece; of Parquet files only ``columns`` are read."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, piece, columns)
        return
    with path.open("rb") as file:
        spans = _json_spans(file, path.suffix, max_row_bytes, piece.offset)
        for row, _, raw in spans:
            if row == piece.rows:
                return
            yield piece.start + row, _parse(raw, max_row_bytes)


def first_columns(path: Path, max_row_bytes: int, look_at: int = 100) -> list[str]:
    """The names of a file's columns: a Parquet file's schema, or the keys of the first row that can be parsed."""
    if path.suffix == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except _ARROW_ERRORS:
            return []
    for _, row in read_rows(path, Piece(0, look_at), frozenset(), max_row_bytes):
        if isinstance(row, dict):
            return list(row)
    return []


def _plan_parquet(path: Path, rows: int) -> list[Piece]:
    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except _ARROW_ERRORS:
        return [Piece(0, 1)]
    pieces: list[Piece] = []
    start = 0
    for group, size in enumerate(sizes):
        last = pieces[-1] if pieces else None
        if last is not None and last.rows + size <= rows:
            pieces[-1] = Piece(last.start, last.rows + size, last.offset, last.groups + 1)
        else:
            pieces.append(Piece(start, size, group, 1))
        start += size
    return pieces


def _read_parquet(path: Path, piece: Piece, columns: frozenset[str]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, buffer_size=CHUNK)
    except _ARROW_ERRORS as error:
        yield piece.start, Bad("unreadable file", f"not a whole Parquet file: {_brief(error)}")
        return
    with file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        row = piece.start
        for group in range(piece.offset, piece.offset + piece.groups):
            about = file.metadata.row_group(group)
            end = row + about.num_rows
            size = max(1, min(BATCH_ROWS, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            try:
                for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
                    for values in _values(batch):
                        yield row, values
                        row += 1
            except _ARROW_ERRORS as error:
                for lost in range(row, end):
                    yield lost, Bad("unreadable row group", f"row group {group}: {_brief(error)}")
            row = end


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Bad]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Bad("invalid UTF-8", _brief(error))


def _parse(raw: bytes | None, max_row_bytes: int) -> dict[str, Any] | Bad:
    if raw is None:
        return Bad("row too large", f"more than max_row_bytes = {max_row_bytes}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", _brief(error))
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", _brief(error))
    return value if isinstance(value, dict) else Bad("not JSON", f"an object was expected, not {type(value).__name__}")


Span = tuple[int, int, bytes | None]
"""(number of the row since reading began, its first byte in the file, its bytes or None where they are too many)"""


def _json_spans(file: BinaryIO, suffix: str, limit: int, offset: int = 0, keep: bool = True) -> Iterator[Span]:
    """The rows of a JSON Lines file or of a JSON array, cut but not parsed. A piece of either begins at ``offset``."""
    if suffix == ".jsonl":
        yield from _lines(file, limit, offset)
        return
    inside = offset > 0
    yield from _elements(file, limit, _behind_mark(file, offset), inside=inside, keep=keep)


def _behind_mark(file: BinaryIO, offset: int) -> int:
    """Go to ``offset``, or behind the byte-order mark that some editors begin a file with."""
    file.seek(0)
    offset = max(offset, len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
    file.seek(offset)
    return offset


def _lines(file: BinaryIO, limit: int, offset: int) -> Iterator[Span]:
    offset = _behind_mark(file, offset)
    row = 0
    while line := file.readline(limit + 1):
        begin, whole = offset, line
        offset += len(line)
        cut = len(line) > limit and not line.endswith(b"\n")
        while cut and (more := file.readline(CHUNK)):
            offset += len(more)
            cut = not more.endswith(b"\n")
        if len(whole) > limit:
            yield row, begin, None
        elif whole.strip():
            yield row, begin, whole
        else:
            continue
        row += 1


_MARK = re.compile(rb'["\\{}\[\],]')
_BLANK = b" \t\r\n"


def _elements(file: BinaryIO, limit: int, offset: int, inside: bool, keep: bool) -> Iterator[Span]:
    """The elements of the array that a file holds; a file without an array around it is one element.

    Only brackets and strings are followed, so that one broken element does not hide the others. Where brackets never
    close, the last element takes the rest of the file.
    """
    depth, in_string, escaped = 1 if inside else 0, False, False
    element = bytearray()
    begin, size, row = offset, 0, 0
    array = inside

    def take(part: bytes) -> None:
        nonlocal size, begin
        if not size:
            left = part.lstrip(_BLANK)
            begin += len(part) - len(left)
            part = left
        size += len(part)
        if keep and size <= limit:
            element.extend(part)

    def finish(end: int) -> Span | None:
        nonlocal size, begin, row
        raw = bytes(element) if size <= limit else None
        span = (row, begin, raw) if size else None
        row += span is not None
        element.clear()
        size, begin = 0, end
        return span

    while chunk := file.read(CHUNK):
        done = 0
        skip = -1
        if escaped:
            skip, escaped = 0, False
        for match in _MARK.finditer(chunk):
            at, mark = match.start(), match[0]
            if at == skip:
                continue
            if mark == b"\\":
                if in_string:
                    skip = at + 1
                    escaped = skip == len(chunk)
            elif mark == b'"':
                in_string = not in_string
            elif in_string:
                continue
            elif mark in b"{[":
                if depth == 0 and mark == b"[" and not array and not size and not chunk[done:at].strip(_BLANK):
                    array, done, begin = True, at + 1, offset + at + 1
                depth += 1
            elif mark in b"}]":
                depth -= 1
                if array and depth == 0:
                    take(chunk[done:at])
                    if span := finish(offset + at + 1):
                        yield span
                    return
            elif array and depth == 1:
                take(chunk[done:at])
                if span := finish(offset + at + 1):
                    yield span
                done = at + 1
        take(chunk[done:])
        offset += len(chunk)
    if span := finish(offset):
        yield span


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."

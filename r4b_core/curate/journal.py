"""The journal: every answer of an endpoint as it arrives, so that what was paid for once is never asked for again.

A line is ``CRC ID JSON``: the CRC-32 of what follows, the request's id (32 hexadecimal digits, a digest of the settings
and of all that was asked), and the answer. It is handed to the system in one write before the answer is used: killing
the process loses what was in flight and nothing else. The disk is synced in the background every 0.2 s, so a power cut
can cost the answers of that time. A last line cut short is removed; a damaged line in the middle is skipped, counted,
and its request made again.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)
_SYNC_EVERY_S = 0.2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_JSON = 8 + 1 + 32 + 1  # where a line's JSON begins
_BEGINNING = re.compile(rb"([0-9a-f]{8} ([0-9a-f]{32} |[0-9a-f]{0,32}\Z)|[0-9a-f]{0,8}\Z)")


class JournalError(ValueError):
    """A journal that cannot be read or written; says why and what to do."""


def encode_line(identity: str, entry: Mapping[str, Any]) -> bytes:
    """An entry as its line."""
    data = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    data = identity.encode("ascii") + b" " + data
    return b"%08x %b\n" % (zlib.crc32(data), data)


def is_whole(line: bytes) -> bool:
    """Whether a line is as it was written."""
    if len(line) < _JSON + 3 or line[-1:] != b"\n" or line[8:9] != b" " or line[_JSON - 1 : _JSON] != b" ":
        return False
    try:
        bytes.fromhex(line[9 : _JSON - 1].decode("ascii"))
        return int(line[:8], 16) == zlib.crc32(memoryview(line)[9:-1])
    except ValueError:
        return False


class Journal:
    """Entries by their id, kept in a file; of those that it holds when it is opened, only the places are in memory.

    Attributes:
        damaged: lines that were skipped.
        cut: bytes of an unfinished last line that were removed.
    """

    def __init__(self, path: str | Path, *, room_wait_s: float = 60.0) -> None:
        """
        Args:
            path: the file; it comes into being with the journal.
            room_wait_s: how long an entry waits for room on a full disk.

        Raises:
            JournalError: if another process writes to it, or it is no journal.
        """
        self.path = Path(path)
        self.damaged = self.cut = self._added = 0
        self._room_wait_s = room_wait_s
        self._dirty = False
        self._failed: JournalError | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._ids, self._places = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        """Entries in the file, those that replace another included."""
        return len(self._ids) + self._added

    def get(self, identity: str) -> dict[str, Any] | None:
        """The last entry of this id that the file held when it was opened, or None."""
        wanted = bytes.fromhex(identity)
        found = int(np.searchsorted(self._ids, _number(wanted), side="right")) - 1
        while found >= 0 and self._ids[found] == _number(wanted):
            line = self._line(int(self._places[found]))
            if line[9 : _JSON - 1] == identity.encode():
                entry: dict[str, Any] = json.loads(line[_JSON:])
                return entry
            found -= 1
        return None

    async def append(self, identity: str, entry: Mapping[str, Any]) -> None:
        """Write an entry; `get` knows of it once the journal is opened again. On a full disk it waits for room.

        Raises:
            JournalError: if there is none in time, or the disk fails.
        """
        line = encode_line(identity, entry)
        waited = 0.0
        while True:
            if self._failed:
                raise self._failed
            try:
                self._write(line)
                break
            except OSError as error:
                if error.errno not in _NO_ROOM or waited >= self._room_wait_s:
                    self._failed = JournalError(
                        f"{self.path}: cannot be written ({error.strerror}); {len(self)} answers are safe in it: "
                        "make room and start again to go on"
                    )
                    raise self._failed from error
                if not waited:
                    logger.warning("%s: no room left; waiting up to %.0f s for some", self.path, self._room_wait_s)
            pause = min(1.0, self._room_wait_s / 10)
            await asyncio.sleep(pause)
            waited += pause
        self._added += 1

    async def keep_synced(self) -> None:
        """Sync the file in the background, for as long as this runs."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            if self._dirty:
                self._dirty = False
                try:
                    await asyncio.to_thread(os.fsync, self._file)
                except OSError as error:
                    self._failed = JournalError(f"{self.path}: the disk fails ({error.strerror}): use another one")

    def close(self) -> None:
        """Sync and close."""
        if self._file < 0:
            return
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                f"{self.path}: another process is writing to it: wait for that one, or give an output of its own"
            ) from None

    def _read(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The first half of every id, sorted, and where its line begins. What follows the last line end is cut off."""
        self._end = 0
        ids, places, rest = array("Q"), array("Q"), b""
        with open(self.path, "rb", buffering=1 << 20) as file:
            for line in file:
                if line[-1:] != b"\n":
                    rest = line
                    break
                if is_whole(line):
                    ids.append(_number(bytes.fromhex(line[9:25].decode())))
                    places.append(self._end)
                else:
                    self.damaged += 1
                self._end += len(line)
        if not ids and (self.damaged or not _BEGINNING.match(rest)):
            raise JournalError(f"{self.path}: is no journal, not a line of it can be read: move the file away")
        if self.damaged:
            logger.warning("%s: %d damaged lines; their requests are made again", self.path, self.damaged)
        if rest:
            self.cut = len(rest)
            os.ftruncate(self._file, self._end)
        numbers = np.frombuffer(ids, dtype=np.uint64)
        order = np.argsort(numbers, kind="stable")
        return numbers[order], np.frombuffer(places, dtype=np.uint64)[order]

    def _line(self, place: int) -> bytes:
        """The whole line that begins there."""
        size, line = 1 << 14, b""
        while (end := line.find(b"\n")) < 0:
            piece = os.pread(self._file, size, place + len(line))
            if not piece:
                break
            line, size = line + piece, 2 * size
        if not is_whole(line[: end + 1]):
            raise JournalError(f"{self.path}: changed while it was in use: let nothing else write to it")
        return line[: end + 1]

    def _write(self, line: bytes) -> None:
        """Append a line or nothing."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, memoryview(line)[written:])
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._dirty = True


def _number(identity: bytes) -> int:
    return int.from_bytes(identity[:8])

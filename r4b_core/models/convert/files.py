"""Folders that are complete or absent, written part by part: what was finished before a stop is not done again.

While it is written, ``NAME`` is the folder ``NAME.partial``: ``content`` becomes ``NAME`` by one rename, ``parts`` says
which files of it are finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from r4b_core.models.convert.settings import ConversionError

RECORD = "conversion.json"
# Files beside the weights that a model cannot be used without; none of them is code.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_MOST_COMPANION_BYTES = 1 << 28

# What is being done ("checking" files, "writing" bytes), how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]


class Stream:
    """What a file is written through: counts, hashes, and tells a progress bar."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], None]) -> None:
        self._file, self._on_bytes, self._digest, self.position = file, on_bytes, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            count = memoryview(data).nbytes
            self._file.write(data)
            self._digest.update(data)
            self.position += count
            self._on_bytes(count)
            return count
        except BaseException as error:
            # torch.save hides it behind a RuntimeError.
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Workplace:
    """The folder in the making; see :func:`workplace`."""

    def __init__(self, target: Path, record: Mapping[str, Any], on_progress: OnProgress | None) -> None:
        self.target, self.record = target, dict(record)
        self.partial = _partial(target)
        self.content, self.parts = self.partial / "content", self.partial / "parts"
        self.done = self.total = 0
        self._on_progress = on_progress

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Say how many bytes the parts will have.

        Raises:
            ConversionError: the disk has no room for what is still to be written.
        """
        self.total = sum(sizes.values())
        todo = sum(size for name, size in sizes.items() if self._finished(name) is None)
        free = shutil.disk_usage(self.partial).free
        if todo > free:
            raise ConversionError(
                f"{self.target.parent} has {_gigabytes(free)} free, and {_gigabytes(todo)} are to be written: free "
                "space, or give another --to"
            )

    def part(self, name: str, write: Callable[[Stream], Any]) -> dict[str, Any]:
        """Write one file, unless it is finished: its size, SHA-256 and what ``write`` returned (plain JSON values)."""
        found = self._finished(name)
        if found is None:
            aside = self.partial / "unfinished"
            with aside.open("wb") as file:
                stream = Stream(file, self._advance)
                try:
                    extra = write(stream)
                except RuntimeError as error:
                    raise stream.error or error from None
                file.flush()
                os.fsync(file.fileno())
            (self.content / name).parent.mkdir(parents=True, exist_ok=True)
            aside.rename(self.content / name)
            found = {"size": stream.position, "sha256": stream.sha256, "extra": extra}
            write_json(self.parts / f"{name.replace('/', '+')}.json", found)
            # As a later run will find it, so that what is made of it does not depend on where this one began.
            return json.loads(json.dumps(found))
        self._advance(found["size"])
        return found

    def _finished(self, name: str) -> dict[str, Any] | None:
        note, path = self.parts / f"{name.replace('/', '+')}.json", self.content / name
        try:
            found = json.loads(note.read_text())
            return found if path.stat().st_size == found["size"] else None
        except (OSError, ValueError, KeyError):
            return None

    def _advance(self, count: int) -> None:
        self.done += count
        if self._on_progress is not None:
            self._on_progress("writing", self.done, max(self.total, self.done))

    def publish(self, last: Mapping[str, Any] | None = None) -> None:
        """Write the record and the files of ``last`` (JSON), make all durable, and give the folder its name."""
        for name, value in {RECORD: self.record, **(last or {})}.items():
            write_json(self.content / name, value, indent=2)
        for folder in [*(path for path in self.content.rglob("*") if path.is_dir()), self.content]:
            _sync(folder)
        if self.target.is_dir():
            self.target.rmdir()
        os.rename(self.content, self.target)
        _sync(self.target.parent)


@contextmanager
def workplace(target: Path, record: Mapping[str, Any], on_progress: OnProgress | None = None) -> Iterator[Workplace]:
    """A place to write ``target``; ``record`` says what it is made of, and what is found of another is discarded.

    Raises:
        ConversionError: ``target`` is something else, another process writes it, or the disk is full.
    """
    check_target(target)
    place = Workplace(target, record, on_progress)
    partial = place.partial
    found = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    if partial.is_file() or (RECORD not in found and found - {"lock", f".{RECORD}.tmp"}):
        raise ConversionError(
            f"{partial} is in the way and not an unfinished conversion: move it, or give another --to"
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "lock").open("w") as lock:
            _lock(lock, partial)
            if _read(partial / RECORD) != place.record:
                for path in (place.content, place.parts):
                    shutil.rmtree(path, ignore_errors=True)
                write_json(partial / RECORD, place.record)
            place.content.mkdir(exist_ok=True)
            place.parts.mkdir(exist_ok=True)
            yield place
        shutil.rmtree(partial, ignore_errors=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what is finished stays in {partial}, and the same command goes on") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
            raise
        raise ConversionError(
            f"{target} could not be written ({error.strerror}). What is finished stays in {partial}: free space, or "
            "mend what is wrong, and give the same command again, which goes on from there; or remove it"
        ) from error


def check_target(target: Path) -> None:
    """
    Raises:
        ConversionError: ``target`` exists and is not an empty folder.
    """
    if not target.name or (target.exists() and not target.is_dir()):
        raise ConversionError(f"--to {target} exists and is not a folder: give another")
    if target.is_dir() and any(target.iterdir()):
        what = "holds another conversion" if (target / RECORD).is_file() else "is not empty"
        raise ConversionError(f"--to {target} exists and {what}: give another, or remove it first")


def is_done(target: Path, record: Mapping[str, Any]) -> bool:
    """Is ``target`` already the finished conversion of the same things?"""
    if _read(target / RECORD) != dict(record):
        return False
    # Killed between giving the folder its name and removing the rest.
    shutil.rmtree(_partial(target), ignore_errors=True)
    return True


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def companions(folder: Path) -> list[Path]:
    """Configuration, tokenizer and processor files of a checkpoint folder.

    Raises:
        ConversionError: one of them is absurdly large.
    """
    found = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    for path in found:
        if path.stat().st_size > _MOST_COMPANION_BYTES:
            raise ConversionError(f"{path} has {path.stat().st_size} bytes, which is no {path.name}")
    return found


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of small files by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of large files by name: enough to see that one was exchanged."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Atomic: beside the target, then renamed."""
    write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _lock(file: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConversionError(f"{partial} is being written by another process: wait for it") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"

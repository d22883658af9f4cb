"""Which files there are to standardize, what is in them, and how they are cut into partitions."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from r4b_core.curate.standardize.formats import detect
from r4b_core.curate.standardize.rows import SUFFIXES, first_columns, plan_pieces
from r4b_core.curate.standardize.settings import Format, InputSettings, StandardizeSettings
from r4b_core.curate.store import Partition, StageError, identify

_SHARD = re.compile(r"(?:(?:train|test|validation|data|part|shard|chunk|sft|rl)[-_]?)?(?:\d+(?:[-_]of[-_]\d+)?)?", re.I)


def plan_inputs(
    inputs: Sequence[InputSettings], settings: StandardizeSettings, advance: Callable[[int], None] = lambda n: None
) -> list[Partition]:
    """The partitions of all inputs, in order: inputs as given, files by name, pieces of at most ``partition_rows``.

    Args:
        advance: is told of the rows found, a file at a time.

    Raises:
        StageError: if an input names no file, or nothing tells the format of one.
    """
    if not inputs:
        raise StageError("inputs: there are none: name files, folders or globs, such as inputs=[data/*.parquet]")
    partitions: list[Partition] = []
    for given in inputs:
        for path in find_files(given.path):
            about = {
                "format": _format(path, given.format, settings),
                "source": given.source or source_name(path),
                "images": str(Path(given.images or path.parent).absolute()),
            }
            identity = identify(path)
            for piece in plan_pieces(path, settings.partition_rows, settings.max_row_bytes):
                cut = dict(start=piece.start, rows=piece.rows, offset=piece.offset, groups=piece.groups)
                partitions.append(Partition(len(partitions), str(path.absolute()), identity, about | cut))
                advance(piece.rows)
    return partitions


def find_files(name: str) -> list[Path]:
    """The data files that a path, a folder or a glob means, sorted.

    Raises:
        StageError: if there are none, or a file named is of another kind.
    """
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    else:
        found = [path] if path.is_file() else map(Path, sorted(glob.glob(name, recursive=True)))
        files = [file for file in found if file.is_file()]
    if strange := [file for file in files if file.suffix not in SUFFIXES]:
        raise StageError(f"inputs: {strange[0]}: only {', '.join(SUFFIXES)} are read")
    if not files:
        raise StageError(f"inputs: {name}: no {', '.join(SUFFIXES)} file there")
    return files


def source_name(path: Path) -> str:
    """The data set that a file belongs to: its name, or its folder's where it is called by a number."""
    stem, folder = path.stem, path.parent
    while _SHARD.fullmatch(stem) and folder.name:
        stem, folder = folder.name, folder.parent
    return stem


def _format(path: Path, given: Format, settings: StandardizeSettings) -> Format:
    if given != "auto":
        return given
    columns = first_columns(path, settings.max_row_bytes)
    if not columns:
        return "jsonl"  # nothing in it can be read: every row of it goes to quarantine, whatever the format
    if (found := detect(columns)) is None:
        raise StageError(
            f"inputs: {path}: the columns {', '.join(columns[:20])} tell of no format that is read (question, or "
            "conversations, or images and texts): name it with format, or take the file out"
        )
    return found

"""From a row to a clean record: its text by rules, its pictures checked, its answer found, or a reason to let it go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from r4b_core.curate.stage import Drop
from r4b_core.curate.standardize import text
from r4b_core.curate.standardize.decontaminate import Benchmarks
from r4b_core.curate.standardize.formats import KNOWN, Columns, Origin, RowError, to_records
from r4b_core.curate.standardize.pictures import Picture, check_picture
from r4b_core.curate.standardize.rows import Bad, Piece, read_rows
from r4b_core.curate.standardize.settings import Format, StandardizeSettings
from r4b_core.curate.standardize.signatures import SIGNATURE, signature
from r4b_core.curate.store import Partition
from r4b_core.data.images import ImageError
from r4b_core.data.records import Record

_RECENT = 8


@dataclass
class Cleaner:
    """The rules of `standardize` that look at one row at a time.

    Attributes:
        settings: which rules, and their limits.
        benchmarks: what must not be trained on, or None.
        lenient: let through what a language model may mend: weak questions and foreign ones.
    """

    settings: StandardizeSettings
    benchmarks: Benchmarks | None = None
    lenient: bool = False
    _recent: dict[bytes, Picture] = field(default_factory=dict, repr=False)

    def rows(self, partition: Partition) -> Iterator[tuple[int, Record | Drop]]:
        """(row, record as it was read or why there is none) for each record of a partition's rows."""
        path, form, origin, piece = _opened(partition, self.settings)
        for row, columns in read_rows(path, piece, KNOWN, self.settings.max_row_bytes):
            for made in self.read(row, columns, form, origin):
                yield row, made

    def read(self, row: int, columns: Columns | Bad, form: Format, origin: Origin) -> list[Record] | list[Drop]:
        """The records of a row, or the one reason why there are none."""
        if isinstance(columns, Bad):
            name = f"{Path(origin.file).stem}-{row}"
            return [Drop(name, origin.source, columns.reason, columns.detail, True, origin.file, row)]
        try:
            return to_records(row, columns, form, origin)
        except RowError as error:
            name = _said(columns.get("id"), f"{Path(origin.file).stem}-{row}")
            source = _said(columns.get("source"), origin.source)
            return [Drop(name, source, error.reason, error.detail, True, origin.file, row)]

    def clean(self, record: Record, row: int) -> tuple[Record, np.ndarray] | Drop:
        """The cleaned record with its signature, or why it goes. The record is changed."""
        settings = self.settings
        record.question = text.clean(record.question, settings.rules)
        if reason := self._question_fault(record.question):
            return _drop(record, row, reason, record.question)
        if not settings.min_images <= len(record.images) <= settings.max_images:
            limits = f"{settings.min_images} to {settings.max_images}"
            return _drop(record, row, "number of images", f"{len(record.images)}, not {limits}")
        try:
            pictures = [self._picture(image) for image in record.images]
        except ImageError as error:
            return _drop(record, row, "broken image", str(error), quarantined=True)
        for number, picture in enumerate(pictures):
            if picture.changed:
                record.provenance[f"image{number}"] = picture.changed
        record.images = [picture.data for picture in pictures]
        record.answer = text.find_answer(record.answer, record.original_answer, settings.max_answer_chars)
        if record.answer is None and settings.answers == "checkable":
            return _drop(record, row, "no checkable answer", (record.original_answer or "")[:200])
        if self.benchmarks is not None:
            tokens = text.words(record.question)
            if found := self.benchmarks.find(tokens, pictures, settings.decontaminate):
                return _drop(record, row, found, record.question[:200])
        return record, np.array(signature(record, pictures, row), SIGNATURE)

    def _question_fault(self, question: str) -> str:
        if text.is_empty(question):
            return "empty question"
        if self.lenient:
            return ""
        if text.is_weak(question):
            return "weak question"
        if text.foreign_share(question) > self.settings.max_foreign:
            return "foreign language"
        return ""

    def _picture(self, data: bytes) -> Picture:
        """The checked picture; the turns of a conversation ask about the same one again and again."""
        if (known := self._recent.get(data)) is not None:
            return known
        settings = self.settings
        limits = dict(max_pixels=settings.max_image_pixels, max_bytes=settings.max_image_bytes)
        picture = check_picture(data, max_side=settings.max_side, **limits)
        if len(self._recent) >= _RECENT:
            self._recent.clear()
        self._recent[data] = picture
        return picture


def _opened(partition: Partition, settings: StandardizeSettings) -> tuple[Path, Format, Origin, Piece]:
    path, about = Path(partition.path), partition.piece
    origin = Origin(
        path.name, about["source"], Path(about["images"]), settings.max_image_bytes, settings.max_text_chars
    )
    return path, about["format"], origin, Piece(about["start"], about["rows"], about["offset"], about["groups"])


def _said(value: object, otherwise: str) -> str:
    """What a broken row says of itself, as far as it can be read."""
    return str(value)[:200] if isinstance(value, str | int) and value != "" else otherwise


def _drop(record: Record, row: int, reason: str, detail: str, *, quarantined: bool = False) -> Drop:
    return Drop(record.id, record.source, reason, detail[:300], quarantined, record.provenance["file"], row)

"""Record: one row of the data engine, and the Parquet files that hold them (Hugging Face `datasets` layout).

Image bytes lie inside the file, so `datasets.load_dataset("parquet", data_files=...)` shows pictures. A record keeps
what every stage found out about it; training reads the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r4b_core.data.images import open_image
from r4b_core.data.schema import Sample
from r4b_core.modes import Mode


@dataclass(slots=True)
class Record:
    """One question on its way through standardize, generate, verify, score and select.

    Attributes:
        id: unique within ``source``; (source, id) is the key of a record everywhere.
        source: the data set that it came from.
        question: cleaned text; ``<image>`` marks where images go (in front where it names none).
        images: encoded bytes (PNG, JPEG or WEBP) of each image.
        answer: short reference answer, or None where there is none.
        original_question, original_answer: as the source had them.
        caption: of the image, from the teacher's caption pass.
        response: the teacher's, from ``<think>`` on.
        finish_reason: of the response, as the endpoint gave it ("stop", "length", ...).
        response_tokens: the endpoint's count of them.
        extracted: the answer found in the response.
        verdict: "right", "wrong" or "undecided"; None where nothing was verified.
        verdict_reason: why, in a short constant phrase.
        tries: how many of a student's answers could be judged.
        right: how many of them were right; the pass rate is right / tries.
        mode: "thinking" or "direct", once a rule has chosen it.
        provenance: notes of the stages: teacher, prompt template, seeds, file and row of origin.
    """

    id: str
    source: str
    question: str
    images: list[bytes] = field(default_factory=list)
    answer: str | None = None
    original_question: str | None = None
    original_answer: str | None = None
    caption: str | None = None
    response: str | None = None
    finish_reason: str | None = None
    response_tokens: int | None = None
    extracted: str | None = None
    verdict: str | None = None
    verdict_reason: str | None = None
    tries: int | None = None
    right: int | None = None
    mode: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """``source/id``."""
        return f"{self.source}/{self.id}"

    @property
    def pass_rate(self) -> float | None:
        """right / tries, or None where no try could be judged."""
        return self.right / self.tries if self.tries and self.right is not None else None


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = (
    *("id", "source", "question", "answer", "original_question", "original_answer", "caption", "response"),
    *("finish_reason", "extracted", "verdict", "verdict_reason", "mode"),
)
_COUNTS = ("response_tokens", "tries", "right")
_FIELDS = tuple(item.name for item in fields(Record))


def _features() -> dict[str, Any]:
    """What `datasets` calls the columns."""
    features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in (*_TEXTS, "provenance")}
    features |= {name: {"dtype": "int64", "_type": "Value"} for name in _COUNTS}
    features["pass_rate"] = {"dtype": "float64", "_type": "Value"}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    return {"info": {"features": features}}


SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in _TEXTS),
        *(pa.field(name, pa.int64()) for name in _COUNTS),
        pa.field("pass_rate", pa.float64()),
        pa.field("provenance", pa.string()),
        pa.field("images", pa.list_(_IMAGE)),
    ],
    metadata={"huggingface": json.dumps(_features())},
)


def to_table(records: Sequence[Record]) -> pa.Table:
    """The records as a table of ``SCHEMA``."""
    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in (*_TEXTS, *_COUNTS)}
    columns["pass_rate"] = [record.pass_rate for record in records]
    columns["provenance"] = [json.dumps(record.provenance, sort_keys=True, ensure_ascii=False) for record in records]
    columns["images"] = [[{"bytes": image, "path": None} for image in record.images] for record in records]
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table | pa.RecordBatch) -> list[Record]:
    """The records of a table that `to_table` made.

    Raises:
        ValueError: if a column of the schema is missing.
    """
    if missing := [name for name in SCHEMA.names if name not in table.schema.names]:
        raise ValueError(
            f"columns {', '.join(missing)} are missing: these are no records; bring the file in with "
            "`r4b curate standardize` first"
        )
    columns = {name: table.column(name).to_pylist() for name in _FIELDS}
    columns["images"] = [[image["bytes"] for image in row or ()] for row in columns["images"]]
    columns["provenance"] = [json.loads(row) if row else {} for row in columns["provenance"]]
    return [Record(**dict(zip(_FIELDS, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def write_records(path: str | Path, records: Sequence[Record], row_group: int = 256) -> None:
    """Write a Parquet file: aside, synced, then renamed, so that it is complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            pq.write_table(to_table(records), file, row_group_size=row_group, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_records(path: str | Path, batch: int = 256) -> Iterator[Record]:
    """The records of a Parquet file, a batch in memory at a time.

    Raises:
        ValueError: if the file is no Parquet file, is cut off, or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    with file:
        for rows in file.iter_batches(batch_size=batch, columns=SCHEMA.names):
            yield from from_table(rows)


def to_sample(record: Record) -> Sample:
    """The record as training takes it: images decoded, the response as it follows ``<think>``.

    Raises:
        ImageError: if an image cannot be opened safely.
    """
    return Sample(
        id=record.key,
        source=record.source,
        images=[open_image(image) for image in record.images],
        question=record.question,
        answer=record.answer or "",
        response=record.response,
        mode=Mode(record.mode) if record.mode else None,
        pass_rate=record.pass_rate,
        provenance=record.provenance,
    )

"""Record: one row of the data engine, and the Parquet files that hold them (Hugging Face `datasets` layout).

Image bytes lie inside the file, so `datasets.load_dataset("parquet", data_files=...)` shows pictures. A record keeps
what every stage found out about it; training reads the same files.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from r4b_core.data.images import IMAGE_FORMATS, ImageError, open_image
from r4b_core.data.schema import Sample
from r4b_core.modes import BLANK_LINE, FORCED_TEXT, NEWLINE, THINK_CLOSE, THINK_OPEN, TURN_END, Mode

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


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


TEACHER_IDS, TEACHER_LOGPROBS = "teacher_ids", "teacher_logprobs"
"""Optional columns beside SCHEMA, list<list<int>> and list<list<float>>: see `Teacher`."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a teacher held for likely at each token of a response as training encodes it, turn end included.

    Attributes:
        ids: per token, the ids of its most probable tokens, at most K of them.
        logprobs: their log-probabilities, at the temperature of ``distill.temperature``.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]


BATCH_BYTES = 32 * 2**20

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
    """The records of a Parquet file, a batch in memory at a time: fewer where they are large.

    Raises:
        ValueError: if the file is no Parquet file, is cut off or damaged, or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    with file:
        try:
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                size = max(1, min(batch, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
                for rows in file.iter_batches(size, row_groups=[group], columns=SCHEMA.names, use_threads=False):
                    yield from from_table(rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: is damaged ({error})") from error


class ResponseError(ValueError):
    """A response that cannot be trained on, with the reason."""


def to_sample(record: Record, *, images: bool = True, response: bool = True) -> Sample:
    """The record as training takes it: images decoded, the response as it follows ``<think>``.

    Args:
        images: False decodes none and leaves ``Sample.images`` empty.
        response: False leaves the response out, which a prompt for reinforcement learning does not need.

    Raises:
        PromptError: if there is no question.
        ImageError: if an image cannot be opened safely.
        ResponseError: if the response is of no known shape.
    """
    from r4b_core.data.processing import PromptError  # torch stays out of the data engine's worker processes

    if not record.question:
        raise PromptError("there is no question")
    rate = record.pass_rate
    sample = Sample(
        id=record.key,
        source=record.source,
        images=[open_image(image) for image in record.images] if images else [],
        question=record.question,
        answer=record.answer or "",
        pass_rate=rate,
        difficulty="" if rate is None else _difficulty(rate),
        provenance=record.provenance,
    )
    if response and record.response is not None:
        if record.finish_reason == "length":
            raise ResponseError("the response was cut off by the token limit (finish_reason is length)")
        sample.response, sample.mode = training_response(record.response, record.mode)
    return sample


def training_response(response: str, mode: str | None = None) -> tuple[str, Mode]:
    """What is to follow ``<think>`` in training, turn end included, and its mode.

    Known shapes (R-4B section 2.2): reasoning, ``</think>`` and an answer; an empty block and an answer; an answer
    alone. ``<think>`` in front may be missing, as it is where the prompt ended with it. Whatever white space stands
    around the parts, they are written as the mode's prefix demands (section 4.1), with a blank line before the answer.

    Args:
        mode: "thinking", "direct", or None: as the response has it. A direct one keeps its answer alone.

    Raises:
        ResponseError: another shape, or a thinking response without reasoning.
    """
    from r4b_core.data.chat import escape

    if mode not in (None, Mode.THINKING, Mode.DIRECT):
        raise ResponseError(f"mode is {mode!r}: thinking and direct can be trained")
    text = response.strip().removesuffix(TURN_END)
    opened, body = text.startswith(THINK_OPEN), text.removeprefix(THINK_OPEN)
    reasoning, closed, answer = body.partition(THINK_CLOSE)
    if opened and not closed:
        raise ResponseError(f"{THINK_OPEN} is never closed")
    if not closed:
        reasoning, answer = "", body
    if THINK_OPEN in reasoning or THINK_OPEN in answer or THINK_CLOSE in answer:
        raise ResponseError(f"{THINK_OPEN} and {THINK_CLOSE} stand in it more than once")
    reasoning, answer = (escape(part.strip(), "assistant")[0] for part in (reasoning, answer))
    if not answer:
        raise ResponseError(f"there is no answer{f' after {THINK_CLOSE}' if closed else ''}")
    if mode == Mode.DIRECT or (mode is None and not reasoning):
        return f"{''.join(FORCED_TEXT[Mode.DIRECT])}{BLANK_LINE}{answer}{TURN_END}", Mode.DIRECT
    if not reasoning:
        raise ResponseError("mode is thinking and there is no reasoning in it")
    opening = "".join(FORCED_TEXT[Mode.THINKING])
    return f"{opening}{reasoning}{NEWLINE}{THINK_CLOSE}{BLANK_LINE}{answer}{TURN_END}", Mode.THINKING


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) that `open_image` will give the encoded image, from its header: no pixel is decoded.

    Raises:
        ImageError: if the header is not that of a PNG, JPEG or WEBP image, or tells of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `open_image` refuses what is too large
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        exif = Image.Exif()
        exif.load(image.info.get("exif") or b"")
        turned = exif.get(_ORIENTATION) in _LYING
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels ({error})") from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged headers
        raise ImageError(f"not a {', '.join(IMAGE_FORMATS)} image with a sound header") from error
    width, height = image.size
    return (width, height) if turned else (height, width)


def _difficulty(rate: float) -> str:
    """For reports: thirds of the pass rate."""
    return "hard" if rate < 1 / 3 else "mid" if rate < 2 / 3 else "easy"

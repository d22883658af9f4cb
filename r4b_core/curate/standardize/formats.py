"""From the rows of MMFineReason, FineVision, LLaVA / ShareGPT, plain files and our own records to records.

What a row lacks or has too much of is said with a short reason; the row then goes to quarantine.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r4b_core.curate.standardize.settings import Format
from r4b_core.data.records import SCHEMA, Record
from r4b_core.modes import IMAGE, THINK_OPEN

Columns = dict[str, Any]

QUESTION = ("question", "prompt", "problem", "query", "instruction")
ANSWER = ("answer", "short_answer", "label", "ground_truth", "final_answer", "solution", "output")
ORIGINAL_QUESTION = ("ori_question", "original_question")
RESPONSE = ("qwen3vl_235b_thinking_response", "response")
CAPTION = ("caption", "qwen3vl_235b_instruct_caption")
PASS_RATE = ("pass_rate", "qwen3vl_4b_pass_rate")
IMAGES = ("images", "image", "image_path", "image_paths")
TURNS = ("conversations", "messages")
ID = ("id", "question_id", "sample_id")
WORD = "needs_reasoning"
"""An annotator's yes or no to an open question, kept as a note for `select`'s rules of the mode."""
MMFINEREASON_TRIES = 4
_ASKS = {"human": True, "user": True, "gpt": False, "assistant": False, "model": False}
_SYSTEM = ("system",)

KNOWN = frozenset(
    (*QUESTION, *ANSWER, *ORIGINAL_QUESTION, *RESPONSE, *CAPTION, *PASS_RATE, *IMAGES, *TURNS, *ID)
    + ("source", "texts", "original_answer", "is_consistent", "consistency_analysis", WORD, *SCHEMA.names)
)


class RowError(ValueError):
    """A row that cannot become a record: a short constant reason, and what exactly."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Origin:
    """Where rows come from, for what they do not say themselves.

    Attributes:
        file: the name of their file.
        source: the name of the data set of rows that carry none.
        images: the folder that image paths start from; they must not lead out of it.
        max_image_bytes: a larger image file is not read.
        max_text_chars: a longer text is refused.
    """

    file: str
    source: str
    images: Path
    max_image_bytes: int
    max_text_chars: int


def detect(columns: Sequence[str]) -> Format | None:
    """The format of rows with these columns, or None."""
    has = set(columns)
    if has.issuperset(SCHEMA.names):
        return "records"
    if has & {"texts"} and has & set(IMAGES):
        return "finevision"
    if has & set(TURNS):
        return "llava"
    if not has & set(QUESTION):
        return None
    marks = {*ORIGINAL_QUESTION, "is_consistent", RESPONSE[0], CAPTION[1], PASS_RATE[1]}
    return "mmfinereason" if has & marks and "question" in has else "jsonl"


def to_records(row: int, columns: Columns, form: Format, origin: Origin) -> list[Record]:
    """The records of a row: one, or one for each turn of a conversation.

    Raises:
        RowError: if the row cannot be used.
    """
    made = list(_READERS[form](row, columns, origin))
    if not made:
        raise RowError("no question", "the row holds no turn of a user that is answered")
    for record in made:
        record.provenance |= {"file": origin.file, "row": str(row)}
        if (word := columns.get(WORD)) is not None:
            record.provenance[WORD] = ("yes" if word else "no") if isinstance(word, bool) else str(word)[:20]
        _check_texts(record, origin.max_text_chars)
    return made


def _mmfinereason(row: int, columns: Columns, origin: Origin) -> Iterator[Record]:
    tries, right = _tries(_number(columns, *PASS_RATE))
    record = Record(
        **_common(row, columns, origin, ("question",)),
        answer=_text(columns, "answer"),
        original_answer=_text(columns, "original_answer"),
        caption=_text(columns, *CAPTION),
        response=_text(columns, *RESPONSE),
        tries=tries,
        right=right,
    )
    record.original_question = _text(columns, *ORIGINAL_QUESTION) or record.question
    if (consistent := columns.get("is_consistent")) is not None:
        if not isinstance(consistent, bool):
            raise _wrong_type("is_consistent", consistent, "true or false")
        record.verdict = "right" if consistent else "wrong"
        record.verdict_reason = "as the data set says"
    if analysis := _text(columns, "consistency_analysis"):
        record.provenance["consistency_analysis"] = analysis
    yield record


def _tries(pass_rate: float | None) -> tuple[int | None, int | None]:
    """Tries and right ones of a published pass rate, which is of four rollouts.

    Raises:
        RowError: if no count of four gives it.
    """
    if pass_rate is None:
        return None, None
    right = pass_rate * MMFINEREASON_TRIES
    if not 0 <= right <= MMFINEREASON_TRIES or not math.isclose(right, round(right), abs_tol=1e-3):
        raise RowError("wrong value", f"pass rate {pass_rate} is not that of {MMFINEREASON_TRIES} tries")
    return MMFINEREASON_TRIES, round(right)


def _finevision(row: int, columns: Columns, origin: Origin) -> Iterator[Record]:
    turns = columns.get("texts")
    if not isinstance(turns, list):
        raise _wrong_type("texts", turns, "a list of {user, assistant}")
    pairs = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise _wrong_type("texts", turn, "a list of {user, assistant}")
        pairs.append((_text(turn, "user"), _text(turn, "assistant")))
    yield from _dialogue(row, columns, origin, pairs)


def _llava(row: int, columns: Columns, origin: Origin) -> Iterator[Record]:
    name = next((name for name in TURNS if columns.get(name) is not None), TURNS[0])
    turns = columns.get(name)
    if isinstance(turns, str):
        turns = _unpack(name, turns)
    if not isinstance(turns, list):
        raise _wrong_type(name, turns, "a list of turns")
    pairs: list[tuple[str | None, str | None]] = []
    asked: str | None = None
    for turn in turns:
        if not isinstance(turn, dict):
            raise _wrong_type(name, turn, "a list of turns")
        role = _text(turn, "from", "role")
        if role in _SYSTEM:
            continue
        if role not in _ASKS:
            raise RowError("wrong value", f"{name}: a turn is from human or gpt, user or assistant, not {role!r}")
        said = _text(turn, "value", "content")
        if _ASKS[role]:
            asked = said
        elif asked is not None:
            pairs.append((asked, said))
            asked = None
    yield from _dialogue(row, columns, origin, pairs)


def _dialogue(
    row: int, columns: Columns, origin: Origin, pairs: Sequence[tuple[str | None, str | None]]
) -> Iterator[Record]:
    """One record for each turn. A reply that thinks is a response; any other is the reference."""
    for turn, (question, reply) in enumerate(pairs):
        common = _common(row, {**columns, "question": question}, origin, ("question",))
        if len(pairs) > 1:
            common["id"] = f"{common['id']}-{turn}"
        thinks = reply is not None and reply.lstrip().startswith(THINK_OPEN)
        yield Record(
            **common,
            answer=_text(columns, *ANSWER[:-2]),
            original_question=question,
            original_answer=None if thinks else reply,
            response=reply if thinks else None,
        )


def _plain(row: int, columns: Columns, origin: Origin) -> Iterator[Record]:
    record = Record(
        **_common(row, columns, origin, QUESTION),
        answer=_text(columns, *ANSWER[:-2]),
        original_answer=_text(columns, "original_answer", *ANSWER[-2:]),
        caption=_text(columns, "caption"),
        response=_text(columns, "response"),
    )
    record.original_question = record.question
    yield record


def _own(row: int, columns: Columns, origin: Origin) -> Iterator[Record]:
    counts = {name: _count(columns, name) for name in ("response_tokens", "tries", "right")}
    texts = {name: _text(columns, name) for name in _OWN_TEXTS}
    record = Record(**_common(row, columns, origin, ("question",)), **texts, **counts)  # type: ignore[arg-type]
    notes = columns.get("provenance") or "{}"
    unpacked = _unpack("provenance", notes) if isinstance(notes, str) else notes
    if not isinstance(unpacked, dict) or not all(isinstance(value, str) for value in unpacked.values()):
        raise _wrong_type("provenance", unpacked, "a JSON object of strings")
    record.provenance = dict(unpacked)
    yield record


_OWN_TEXTS = (
    *("answer", "original_question", "original_answer", "caption", "response", "finish_reason"),
    *("extracted", "verdict", "verdict_reason", "mode"),
)
_READERS: dict[Format, Callable[[int, Columns, Origin], Iterator[Record]]] = {
    "mmfinereason": _mmfinereason,
    "finevision": _finevision,
    "llava": _llava,
    "jsonl": _plain,
    "records": _own,
}


def _common(row: int, columns: Columns, origin: Origin, question: Sequence[str]) -> dict[str, Any]:
    """Id, source, question and images of a row."""
    if not any(name in columns for name in question):
        raise RowError("missing column", " or ".join(question))
    asked = _text(columns, *question)
    if asked is None:
        raise RowError("null question", f"column {' or '.join(question)}")
    return {
        "id": _id(columns) or f"{Path(origin.file).stem}-{row}",
        "source": _text(columns, "source") or origin.source,
        "question": asked,
        "images": _images(columns, origin),
    }


def _text(columns: Columns, *names: str) -> str | None:
    """The first of some columns that holds a text; None where none does."""
    for name in names:
        value = columns.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _wrong_type(name, value, "a text")
        return value if isinstance(value, str) else str(value)
    return None


def _id(columns: Columns) -> str | None:
    for name in ID:
        value = columns.get(name)
        if value is not None and value != "":
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise _wrong_type(name, value, "a text or a whole number")
            return str(value)
    return None


def _number(columns: Columns, *names: str) -> float | None:
    for name in names:
        value = columns.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _wrong_type(name, value, "a number")
        return float(value)
    return None


def _count(columns: Columns, name: str) -> int | None:
    value = columns.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong_type(name, value, "a count")
    return value


def _images(columns: Columns, origin: Origin) -> list[bytes]:
    for name in IMAGES:
        value = columns.get(name)
        if value is None or value == "":
            continue
        values = value if isinstance(value, list) else [value]
        return [_image(name, one, origin) for one in values]
    return []


def _image(name: str, value: Any, origin: Origin) -> bytes:
    if isinstance(value, dict):
        held = value.get("bytes")
        value = held if held is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _wrong_type(name, value, "image bytes, {bytes, path} or a path")
    if value.startswith("data:"):
        return _data_uri(name, value)
    return _file(value, origin)


def _data_uri(name: str, value: str) -> bytes:
    head, comma, body = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("base64 was expected")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise RowError("broken image", f"{name}: a data URI that cannot be decoded ({error})") from error


def _file(name: str, origin: Origin) -> bytes:
    """The bytes of an image file below the images' folder."""
    try:
        folder = origin.images.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise RowError("image path outside its folder", f"{name[:200]} leads out of {folder}")
        if not path.is_file():
            raise RowError("missing image", f"{name[:200]} in {folder}")
        with path.open("rb") as file:
            return file.read(origin.max_image_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError("missing image", f"{name[:200]!r}: {error}") from error


def _unpack(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong type", f"{name}: a text that is no JSON ({error})") from error


def _check_texts(record: Record, most: int) -> None:
    texts = {name: getattr(record, name) for name in ("id", "source", "question", *_OWN_TEXTS)} | record.provenance
    for name, text in texts.items():
        if text is None:
            continue
        if len(text) > most:
            raise RowError("field too large", f"{name}: {len(text)} characters, more than max_text_chars = {most}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("invalid UTF-8", f"{name}: {error.reason} at {error.start}") from error
    if (marks := record.question.count(IMAGE)) not in (0, len(record.images)):
        raise RowError("images do not match", f"{marks} {IMAGE} marks, {len(record.images)} images")


def _wrong_type(name: str, value: Any, expected: str) -> RowError:
    shown = "nothing" if value is None else type(value).__name__
    return RowError("wrong type", f"{name}: {expected} was expected, not {shown}")

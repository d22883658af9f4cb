"""The demo's raw data: two thousand rows about real pictures, in three formats, with faults planted in them.

Pictures are scikit-learn's handwritten digits and photographs, and those of scikit-image that come inside its package.
What a question asks is computed from the pixels, so its answer is true. Every row has a fate, and the fates say what
each stage has to find.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from r4b_core.modes import IMAGE

Pixels = NDArray[np.uint8]
_QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_GREY_TEXTURES = ("brick", "camera", "coins", "grass", "gravel", "moon", "text", "page")


class Fate(StrEnum):
    """What was planted in a row, named by the stage that has to find it."""

    BROKEN_IMAGE = "broken image"
    MISSING_IMAGE = "missing image"
    NULL_QUESTION = "null question"
    WRONG_TYPE = "wrong type"
    INVALID_UTF8 = "invalid UTF-8"
    DUPLICATE_ID = "duplicate id"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near duplicate"
    NO_ANSWER = "no answer"
    IN_A_BENCHMARK = "in a benchmark"
    REFUSED = "refused by the teacher's server"
    TRUNCATED = "truncated"
    REPETITIVE = "repetitive"
    MALFORMED = "malformed"
    WRONG = "wrong"
    JUDGED_RIGHT = "right by the judge"
    JUDGED_WRONG = "wrong by the judge"
    UNCLEAR = "unclear to rules and judge"
    FEW_TRIES = "too few tries of the student"
    SOLVED_0 = "student right 0 of 4"
    SOLVED_1 = "student right 1 of 4"
    SOLVED_2 = "student right 2 of 4"
    SOLVED_3 = "student right 3 of 4"
    SOLVED_4 = "student right 4 of 4"

    @property
    def solved(self) -> int | None:
        """How many of the student's four tries are right, where that is the fate."""
        return int(self[14]) if self.startswith("student right") else None


# Rows of each fate in (digits, photographs, textures); the formats differ in what can be wrong with a row.
COUNTS: dict[Fate, tuple[int, int, int]] = {
    Fate.BROKEN_IMAGE: (8, 8, 8),
    Fate.MISSING_IMAGE: (0, 6, 4),
    Fate.NULL_QUESTION: (6, 0, 4),
    Fate.WRONG_TYPE: (0, 5, 4),
    Fate.INVALID_UTF8: (0, 0, 6),
    Fate.DUPLICATE_ID: (5, 5, 5),
    Fate.DUPLICATE: (12, 10, 8),
    Fate.NEAR_DUPLICATE: (10, 9, 6),
    Fate.NO_ANSWER: (9, 6, 6),
    Fate.IN_A_BENCHMARK: (8, 6, 4),
    Fate.REFUSED: (4, 3, 3),
    Fate.TRUNCATED: (10, 9, 8),
    Fate.REPETITIVE: (8, 8, 6),
    Fate.MALFORMED: (6, 5, 5),
    Fate.WRONG: (70, 50, 40),
    Fate.JUDGED_RIGHT: (0, 10, 8),
    Fate.JUDGED_WRONG: (0, 7, 5),
    Fate.UNCLEAR: (0, 7, 6),
    Fate.FEW_TRIES: (6, 5, 4),
    Fate.SOLVED_0: (60, 60, 50),
    Fate.SOLVED_1: (50, 40, 40),
    Fate.SOLVED_2: (40, 40, 30),
    Fate.SOLVED_3: (60, 50, 40),
    Fate.SOLVED_4: (398, 326, 255),
}
SOURCES = ("digits", "photographs", "textures")
_PROSE = (Fate.JUDGED_RIGHT, Fate.JUDGED_WRONG, Fate.UNCLEAR)
_COPIES = (Fate.DUPLICATE_ID, Fate.DUPLICATE, Fate.NEAR_DUPLICATE)


@dataclass(frozen=True)
class Item:
    """One row: what it asks, the truth, how a right and a wrong answer look, and what was planted.

    Attributes:
        said: a right answer in other words than ``answer``.
        wrong: an answer that looks right.
        original: the item that a copy repeats, by id.
    """

    id: str
    source: str
    fate: Fate
    question: str
    answer: str
    said: str
    wrong: str
    image: bytes
    original: str | None = None

    @property
    def key(self) -> str:
        return f"{self.source}/{self.id}"


@dataclass(frozen=True)
class Corpus:
    """The rows, and where they were written."""

    items: list[Item]
    files: dict[str, Path]
    benchmark: Path


def build(folder: Path, seed: int = 0, share: float = 1.0) -> Corpus:
    """Make the rows and write ``digits.parquet`` (MMFineReason's columns), ``photographs.jsonl`` (LLaVA
    conversations with a folder of images), ``textures.jsonl`` (plain rows with a folder of images) and
    ``benchmark.jsonl``.

    Args:
        share: of the rows of each fate that are made, at least one of each.

    Raises:
        ValueError: if scikit-image is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items: list[Item] = []
    for place, source in enumerate(SOURCES):
        fates = [fate for fate, counts in COUNTS.items() for _ in range(math.ceil(counts[place] * share))]
        items += _items(source, fates, seed)
    by_source = {source: [item for item in items if item.source == source] for source in SOURCES}
    files = {
        "digits": _write_digits(folder / "digits.parquet", by_source["digits"]),
        "photographs": _write_photographs(folder / "photographs.jsonl", by_source["photographs"]),
        "textures": _write_textures(folder / "textures.jsonl", by_source["textures"]),
    }
    benchmark = folder / "benchmark.jsonl"
    leaked = [item for item in items if item.fate is Fate.IN_A_BENCHMARK]
    _write_lines(benchmark, [{"id": item.id, "question": item.question, "answer": item.answer} for item in leaked])
    return Corpus(items, files, benchmark)


def _items(source: str, fates: Sequence[Fate], seed: int) -> list[Item]:
    rng = random.Random(f"{seed}/{source}")
    make = {"digits": _digits, "photographs": _photograph, "textures": _texture}[source]
    fresh = [fate for fate in fates if fate not in _COPIES]
    rng.shuffle(fresh)
    items = [make(number, fate, rng) for number, fate in enumerate(fresh)]
    # What is copied has to survive until duplicates are looked for, has one copy at most, and is long enough for a
    # changed word to be little.
    originals = iter([item for item in items if item.fate.solved == 4 and len(item.question.split()) > 10])
    copies = [_copy(next(originals), fate, len(items) + n) for n, fate in enumerate(f for f in fates if f in _COPIES)]
    return items + copies


def _copy(item: Item, fate: Fate, number: int) -> Item:
    """A row that repeats an earlier one: under the same id, word for word, or a little changed."""
    if fate is Fate.DUPLICATE_ID:
        return replace(item, fate=fate, original=item.id, question=f"{item.question} Take a second look.")
    copy = replace(item, id=str(10_000 + number), fate=fate, original=item.id)
    if fate is Fate.NEAR_DUPLICATE:
        pixels = np.asarray(Image.open(io.BytesIO(item.image)).convert("RGB"))
        return replace(copy, question=f"{item.question} Thanks!", image=_jpeg(pixels, 70))
    return copy


def _finish(number: int, source: str, fate: Fate, pixels: Pixels, asked: tuple[str, str, str, str]) -> Item:
    """The item of a picture and (question, answer, said, wrong)."""
    question, answer, said, wrong = asked
    if fate in _PROSE:
        question = f"In picture {number} of {source}, what stands out at first sight, and why would one look there?"
        answer = f"the part that differs most from what lies around it, which is number {number} of its kind"
        said = "whatever breaks the pattern of the rest, for the eye goes to what is unlike its neighbours"
        wrong = "nothing does, since all of it is of one colour and one shape from edge to edge"
    if fate is Fate.IN_A_BENCHMARK:
        question = _leaked_question(number, source)
    if fate is Fate.NO_ANSWER:
        answer = "see above"
    if number % 7 == 0:
        question = f"{question} (5 points)"
    if number % 11 == 0:
        question = f"{question} Source: https://example.org/{source}/{number}"
    image = _jpeg(pixels, 92) if source == "photographs" else _png(pixels)
    return Item(str(number), source, fate, question, answer, said, wrong, image)


def _leaked_question(number: int, source: str) -> str:
    rng = random.Random(f"benchmark/{source}/{number}")
    words = "oak river amber stone violet harbour copper meadow candle winter falcon mirror saddle thunder".split()
    rng.shuffle(words)
    return f"Benchmark item {number}: which of {' '.join(words[:7])} comes before {' '.join(words[7:])} in the picture?"


def _digits(number: int, fate: Fate, rng: random.Random) -> Item:
    """Handwritten digits side by side."""
    count = rng.choice((1, 2, 4))
    chosen = [rng.randrange(len(_digit_images()[1])) for _ in range(count)]
    images, labels = _digit_images()
    values = [int(labels[i]) for i in chosen]
    strip = np.concatenate([images[i] for i in chosen], 1)
    pixels = np.asarray(Image.fromarray(strip).resize((64 * count, 64), Image.Resampling.NEAREST).convert("RGB"))
    start = f"Picture {number} shows"
    if count == 1:
        value = values[0]
        other = (value + rng.randrange(1, 10)) % 10
        if rng.random() < 0.5:
            asked = (f"{start} one handwritten digit. Which is it?", f"{value}", f"{value}.0", f"{10 + value}")
        else:
            options = [value, other, (value + 11 - other) % 10]
            options = list(dict.fromkeys(options))
            rng.shuffle(options)
            listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABC", options, strict=False))
            right, false = ("ABC"[options.index(v)] for v in (value, other))
            asked = (f"{start} one handwritten digit. Which? {listed}", right, f"({right}) {value}", false)
    elif count == 2:
        total = sum(values)
        asked = (
            f"{start} two handwritten digits. What is their sum?",
            f"{total}",
            f"\\boxed{{{total}}}",
            f"{total + 1}",
        )
    else:
        even = sum(value % 2 == 0 for value in values)
        wrong = f"{(even + 1) % 5}/4"
        asked = (f"{start} four handwritten digits. What fraction of them is even?", f"{even}/4", f"{even / 4}", wrong)
    return _finish(number, "digits", fate, pixels, asked)


def _photograph(number: int, fate: Fate, rng: random.Random) -> Item:
    """A piece of a colour photograph."""
    photographs = _photographs()
    whole = photographs[rng.randrange(len(photographs))]
    height, width = rng.randrange(96, 200), rng.randrange(96, 200)
    top, left = rng.randrange(whole.shape[0] - height), rng.randrange(whole.shape[1] - width)
    pixels = np.ascontiguousarray(whole[top : top + height, left : left + width])
    return _finish(number, "photographs", fate, pixels, _measure(number, pixels, rng))


def _texture(number: int, fate: Fate, rng: random.Random) -> Item:
    """A piece of a grey picture."""
    pictures = _textures()
    whole = pictures[rng.randrange(len(pictures))]
    side = rng.randrange(64, 150)
    top, left = rng.randrange(whole.shape[0] - side), rng.randrange(whole.shape[1] - side)
    turned = rng.randrange(4)
    pixels = np.ascontiguousarray(np.rot90(whole[top : top + side, left : left + side], turned))
    if rng.random() < 0.25:
        angle, other = 90 * turned, 90 * ((turned + 1) % 4)
        question = f"Picture {number} was turned counterclockwise. By how many degrees: 0, 90, 180 or 270?"
        return _finish(
            number, "textures", fate, pixels, (question, f"{angle}", f"${angle}^\\circ$", f"{other} degrees")
        )
    return _finish(number, "textures", fate, pixels, _measure(number, pixels, rng))


def _measure(number: int, pixels: Pixels, rng: random.Random) -> tuple[str, str, str, str]:
    """A question about a picture's pixels: (question, answer, said, wrong)."""
    height, width = pixels.shape[:2]
    grey = pixels.mean(2)
    kind = rng.randrange(4)
    if kind == 0:
        return f"How wide is picture {number}?", f"{width} pixels", f"{width}", f"{width - 10} pixels"
    if kind == 1:
        share = round(100 * float((grey < 128).mean()))
        question = f"What percentage of picture {number} is darker than middle grey, to a whole percent?"
        return question, f"{share}%", f"{share} percent", f"{(share + 7) % 101}%"
    if kind == 2:
        total = 1000 * height + width
        question = f"Picture {number} has h rows and w columns of pixels. What is 1000 h + w?"
        return question, f"{total:,}", f"{total}", f"{total // 10}"
    means = [
        float(grey[rows, columns].mean())
        for rows in (slice(height // 2), slice(height // 2, None))
        for columns in (slice(width // 2), slice(width // 2, None))
    ]
    best = int(np.argmax(means))
    listed = " ".join(f"{letter}. {place}" for letter, place in zip("ABCD", _QUARTERS, strict=True))
    question = f"Which quarter of picture {number} is the brightest? {listed}"
    return question, "ABCD"[best], f"{'ABCD'[best]}. {_QUARTERS[best]}", "ABCD"[(best + 1) % 4]


@cache
def _digit_images() -> tuple[Pixels, NDArray[np.int64]]:
    bunch = load_digits()
    return (255 - bunch.images * (255 / 16)).astype(np.uint8), bunch.target


@cache
def _photographs() -> list[Pixels]:
    pictures = [np.asarray(image) for image in load_sample_images().images]
    return pictures + [_packaged(name)[..., :3] for name in ("astronaut", "chelsea", "coffee", "rocket")]


@cache
def _textures() -> list[Pixels]:
    found = []
    for name in _GREY_TEXTURES:
        picture = _packaged(name)
        grey = picture if picture.ndim == 2 else picture[..., 0]
        found.append(np.repeat(grey[..., None], 3, 2))
    return found


def _packaged(name: str) -> Pixels:
    """A picture that lies inside scikit-image's package; its other ones are downloaded, which this never does."""
    try:
        import skimage
    except ModuleNotFoundError:
        raise ValueError("the demo's pictures need scikit-image: pip install 'r4b[demo]'") from None
    folder = Path(skimage.__file__).parent / "data"
    found = [path for path in (folder / f"{name}.png", folder / f"{name}.jpg") if path.is_file()]
    if not found:
        raise ValueError(f"{folder}: this scikit-image has no picture {name}: pip install 'r4b[demo]'")
    return np.asarray(Image.open(found[0]))


def _png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _image_of(item: Item) -> bytes:
    return item.image[: len(item.image) // 2] if item.fate is Fate.BROKEN_IMAGE else item.image


def _write_digits(path: Path, items: Sequence[Item]) -> Path:
    """MMFineReason's columns."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    asked = [None if item.fate is Fate.NULL_QUESTION else f"{IMAGE}{item.question}" for item in items]
    columns = {
        "id": pa.array([int(item.id) for item in items], pa.int64()),
        "source": pa.array([item.source for item in items]),
        "question": pa.array(asked, pa.string()),
        "ori_question": pa.array([item.question for item in items]),
        "original_answer": pa.array([item.answer for item in items]),
        "answer": pa.array([item.answer for item in items]),
        "image": pa.array([{"bytes": _image_of(item), "path": None} for item in items], image),
    }
    table = io.BytesIO()
    pq.write_table(pa.table(columns), table, row_group_size=200)
    _write(path, table.getvalue())
    return path


def _write_photographs(path: Path, items: Sequence[Item]) -> Path:
    """LLaVA's conversations."""

    def row(item: Item, image: str) -> dict[str, object]:
        turns: object = [
            {"from": "human", "value": f"{IMAGE}\n{item.question}"},
            {"from": "gpt", "value": item.answer},
        ]
        if item.fate is Fate.WRONG_TYPE:
            turns = 7
        return {"id": item.id, "source": item.source, "image": image, "answer": item.answer, "conversations": turns}

    _write_lines(path, [row(item, name) for item, name in _with_images(path.parent / "photographs", items, "jpg")])
    return path


def _write_textures(path: Path, items: Sequence[Item]) -> Path:
    """Plain rows."""

    def row(item: Item, image: str) -> dict[str, object]:
        question: object = None if item.fate is Fate.NULL_QUESTION else item.question
        if item.fate is Fate.WRONG_TYPE:
            question = [item.question]
        return {"id": item.id, "source": item.source, "image": image, "question": question, "answer": item.answer}

    spoil = [item.fate is Fate.INVALID_UTF8 for item in items]
    rows = [row(item, name) for item, name in _with_images(path.parent / "textures", items, "png")]
    _write_lines(path, rows, lambda number, line: line.replace(b"icture", b"\xffcture") if spoil[number] else line)
    return path


def _with_images(folder: Path, items: Sequence[Item], suffix: str) -> Iterator[tuple[Item, str]]:
    """The items with the names of their image files, which are written."""
    folder.mkdir(exist_ok=True)
    for place, item in enumerate(items):
        name = f"{folder.name}/{place:04}.{suffix}"
        if item.fate is not Fate.MISSING_IMAGE:
            _write(folder.parent / name, _image_of(item))
        yield item, name


def _write_lines(
    path: Path, rows: Sequence[object], change: Callable[[int, bytes], bytes] = lambda number, line: line
) -> None:
    lines = (change(number, json.dumps(row).encode()) for number, row in enumerate(rows))
    _write(path, b"".join(line + b"\n" for line in lines))


def _write(path: Path, data: bytes) -> None:
    """Write a file that is not there already: stages that have read it take a newer one for another one."""
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)

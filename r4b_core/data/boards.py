"""The board task: arithmetic on coloured tiles with real handwritten digits.

A board has four columns of 16x16 tiles, read row by row. The first tile is grey: the starting value. Each further tile
is an operation: orange adds its digit, blue multiplies by it, green forgets what came before and sets the value to its
digit; all modulo 10. Unused places of the last row are black. Three families of questions are asked:

* ``read``: which digit is at a position; ``count``: how many tiles have a colour. One look is enough: easy.
* ``value``: the value at the end. Easy if the last tile is a *set* (one look, though the question is the hard one's),
  mid with 1 or 2 operations, hard with 3 or more: these take written steps. A *set* never stands in the middle of a
  value board, so its effective length is 0 or its number of operations.

The digits are scikit-learn's 1,797 images of 8x8, less the 22 that their nearest neighbours contradict, split by
image into ``train`` and ``held_out`` once and for all. Step ``n`` of a stream is made from (seed, split, stream, n)
alone: a resumed run continues at its step number.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from r4b_core.config.recipe import DataConfig
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import ADD, COLOURS, MULTIPLIERS, MULTIPLY, SET, position_word
from r4b_core.modes import FORCED_TEXT, THINK_CLOSE, TURN_END, Mode

Split = Literal["train", "held_out"]
Family = Literal["read", "count", "value"]
Difficulty = Literal["easy", "mid", "hard"]
FAMILIES: tuple[Family, ...] = get_args(Family)

GENERATOR_VERSION = 2
COLUMNS = 4
TILE = 16
START, ADDS, MULTIPLIES, SETS, EMPTY = range(5)
SYMBOLS = ("", ADD, MULTIPLY, SET)
MULTIPLY_SHARE = 0.35
SET_LAST_SHARE = 0.2
SHORT_SHARE = 0.5

_INK = np.array([255, 252, 240], np.float32)
_GROUND = np.array([[86, 92, 104], [206, 98, 16], [38, 88, 190], [22, 132, 74]], np.float32)
_EDGE_SHADE = 0.72
_DIGITS_OF_KIND = (tuple(range(10)), tuple(range(1, 10)), MULTIPLIERS, tuple(range(10)))
_DEFAULT = DataConfig()


@dataclass(frozen=True)
class AlignmentBoard:
    """A bare image and what each of its tiles shows.

    Attributes:
        image: uint8 [height, width, 3], every tile used.
        digits: int64 [tiles], raster order.
        colours: int64 [tiles], index into ``tokenizer.COLOURS``.
    """

    image: NDArray[np.uint8]
    digits: NDArray[np.int64]
    colours: NDArray[np.int64]


def make_samples(
    split: Split,
    seed: int,
    stream: str,
    step: int,
    count: int,
    mix: Mapping[str, float],
    difficulty: Difficulty | None = None,
    config: DataConfig = _DEFAULT,
) -> list[Sample]:
    """``count`` questions without responses, the same for the same arguments.

    ``mix`` gives the share of each family; the batch holds it as exactly as whole samples allow. ``difficulty`` makes
    only such samples, from the families of ``mix`` that have them.

    Raises:
        ValueError: for an unknown split or family, or a difficulty that no family of ``mix`` can have.
    """
    rng = _generator(split, seed, stream, step)
    shares = _shares(mix, difficulty, config)
    family = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(count) + rng.random()) / count, side="right")
    family = rng.permutation(family)
    is_value = family == FAMILIES.index("value")

    operations = _operation_counts(rng, is_value, difficulty, config.max_operations)
    set_last = is_value & (rng.random(count) < {None: SET_LAST_SHARE, "easy": 1.0}.get(difficulty, 0.0))
    kinds = _draw_kinds(rng, is_value, set_last, operations, config.max_operations)
    digits = _draw_digits(rng, kinds)
    values = _values(kinds, digits)
    asked_tile = (rng.random(count) * (operations + 1)).astype(np.int64)
    asked_kind = rng.integers(ADDS, EMPTY, count)
    counted = (kinds == asked_kind[:, None]).sum(axis=1)
    images = _render(rng, kinds, digits, split, config)

    samples = []
    for i in range(count):
        name = FAMILIES[family[i]]
        tiles = int(operations[i]) + 1
        board = " ".join(
            f"{SYMBOLS[kind]}{digit}" for kind, digit in zip(kinds[i, :tiles], digits[i, :tiles], strict=True)
        )
        level: Difficulty = "easy"
        if name == "read":
            question, answer = f"digit at {position_word(asked_tile[i])} ?", digits[i, asked_tile[i]]
        elif name == "count":
            question, answer = f"count {COLOURS[asked_kind[i]]} ?", counted[i]
        else:
            question, answer = "final value ?", values[i, tiles - 1]
            if not set_last[i]:
                level = "mid" if tiles <= 3 else "hard"
        samples.append(
            Sample(
                id=f"{split}/{stream}/{seed}/{step}/{i}",
                source=name,
                images=[images[i][: -(-tiles // COLUMNS) * TILE]],
                question=question,
                answer=str(answer),
                difficulty=level,
                provenance={"board": board},
            )
        )
    return samples


def make_alignment(
    split: Split, seed: int, stream: str, step: int, count: int, config: DataConfig = _DEFAULT
) -> list[AlignmentBoard]:
    """``count`` bare boards of one or more full rows, digits and colours drawn independently and uniformly."""
    rng = _generator(split, seed, stream, step)
    max_tiles = config.max_operations + 1
    max_rows = -(-max_tiles // COLUMNS)
    tiles = rng.integers(1, max_rows + 1, count) * COLUMNS
    kinds = rng.integers(START, EMPTY, (count, max_rows * COLUMNS))
    kinds[np.arange(max_rows * COLUMNS) >= tiles[:, None]] = EMPTY
    digits = rng.integers(0, 10, kinds.shape)
    images = _render(rng, kinds, digits, split, config)
    return [
        AlignmentBoard(images[i][: n // COLUMNS * TILE], digits[i, :n], kinds[i, :n])
        for i, n in enumerate(tiles.tolist())
    ]


def write_response(sample: Sample, mode: Mode) -> str:
    """What follows ``<think>`` when ``sample`` is answered rightly in ``mode``, decision and turn end included.

    Thinking walks over the board: for ``value``, per tile its position, its operation and the running value; for
    ``count`` its position and the running count; for ``read`` the position, colour and digit of the tile asked for.

    Raises:
        ValueError: for mode AUTO, which is no response's mode, or a sample that is not of the board task.
    """
    if mode is Mode.AUTO:
        raise ValueError("mode auto leaves the decision to the model: write a response for thinking or direct")
    if "board" not in sample.provenance:
        raise ValueError(f"sample {sample.id!r} carries no board: only samples of the board task can be written out")
    opening = "".join(FORCED_TEXT[mode])
    if mode is Mode.DIRECT:
        return f"{opening}{sample.answer}{TURN_END}"
    trace = " ".join(_trace(sample.source, sample.question, sample.provenance["board"].split()))
    return f"{opening}{trace}{THINK_CLOSE}{sample.answer}{TURN_END}"


def fingerprint(config: DataConfig, split: Split) -> str:
    """Hex digest of everything that decides which samples a (seed, stream, step) gives.

    Covers the digit images, the split, the settings, the generator's version, and a few samples made on the spot: a
    NumPy whose random streams differ is noticed too. A resumed run compares it with the one it began with.
    """
    images, labels = _digits()
    digest = hashlib.sha256(f"{GENERATOR_VERSION}|{split}|{config.model_dump_json()}".encode())
    digest.update((images * 16).astype(np.uint8).tobytes())
    digest.update(labels.tobytes())
    digest.update(_class_table(split, config.held_out)[0].tobytes())
    for sample in make_samples(split, 0, "fingerprint", 0, 16, dict.fromkeys(FAMILIES, 1.0), config=config):
        digest.update(f"{sample.question}|{sample.provenance['board']}|{sample.answer}".encode())
    return digest.hexdigest()


def _generator(split: str, seed: int, stream: str, step: int) -> np.random.Generator:
    if split not in get_args(Split):
        raise ValueError(f"split = {split!r} is unknown: choose one of {', '.join(get_args(Split))}")
    names = [zlib.crc32(name.encode()) for name in (split, stream)]
    return np.random.default_rng([seed, *names, step])


def _shares(mix: Mapping[str, float], difficulty: str | None, config: DataConfig) -> NDArray[np.float64]:
    """Share of each family, normalised."""
    if unknown := set(mix) - set(FAMILIES):
        raise ValueError(f"mix names the unknown family {min(unknown)!r}: choose among {', '.join(FAMILIES)}")
    if difficulty not in (None, *get_args(Difficulty)):
        raise ValueError(f"difficulty = {difficulty!r} is unknown: choose one of {', '.join(get_args(Difficulty))}")
    possible = {"mid": ("value",), "hard": ("value",) if config.max_operations >= 3 else ()}
    able = possible.get(difficulty or "", FAMILIES)
    shares = np.array([mix.get(family, 0.0) if family in able else 0.0 for family in FAMILIES])
    if (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(
            f"mix = {dict(mix)} leaves nothing to draw for difficulty {difficulty!r}: give a positive share to one of "
            f"{', '.join(able) or 'no family (hard boards need max_operations >= 3)'}"
        )
    return shares / shares.sum()


def _operation_counts(
    rng: np.random.Generator, is_value: NDArray[np.bool_], difficulty: str | None, most: int
) -> NDArray[np.int64]:
    """Number of operations [n]: half of the boards have 1 or 2, so that the first steps are learnt early."""
    count = len(is_value)
    short = rng.random(count) < (SHORT_SHARE if most > 2 else 1.0)
    if difficulty in ("mid", "hard"):
        short = np.where(is_value, difficulty == "mid", short)
    brief = rng.integers(1, min(2, most) + 1, count)
    return np.where(short, brief, rng.integers(min(3, most), most + 1, count))


def _draw_kinds(
    rng: np.random.Generator,
    is_value: NDArray[np.bool_],
    set_last: NDArray[np.bool_],
    operations: NDArray[np.int64],
    most: int,
) -> NDArray[np.int64]:
    """Kind of each tile [n, places]; EMPTY after the last one, places a whole number of rows."""
    places = -(-(most + 1) // COLUMNS) * COLUMNS
    arithmetic = np.where(rng.random((len(is_value), places)) < MULTIPLY_SHARE, MULTIPLIES, ADDS)
    any_operation = rng.integers(ADDS, EMPTY, arithmetic.shape)
    kinds = np.where(is_value[:, None], arithmetic, any_operation)
    kinds[:, 0] = START
    kinds[np.flatnonzero(set_last), operations[set_last]] = SETS
    kinds[np.arange(places) > operations[:, None]] = EMPTY
    return kinds


def _draw_digits(rng: np.random.Generator, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Digit of each tile, uniform over those that its kind may show."""
    table = np.zeros((EMPTY + 1, 10), np.int64)
    sizes = np.ones(EMPTY + 1, np.int64)
    for kind, digits in enumerate(_DIGITS_OF_KIND):
        table[kind, : len(digits)], sizes[kind] = digits, len(digits)
    return table[kinds, (rng.random(kinds.shape) * sizes[kinds]).astype(np.int64)]


def _values(kinds: NDArray[np.int64], digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Running value after each tile [n, places]."""
    values = digits.copy()
    for place in range(1, kinds.shape[1]):
        kind, digit, before = kinds[:, place], digits[:, place], values[:, place - 1]
        values[:, place] = np.select([kind == ADDS, kind == MULTIPLIES], [before + digit, before * digit], digit) % 10
    return values


def _trace(family: str, question: str, board: list[str]) -> list[str]:
    if family == "read":
        place = question.split()[2]
        tile = board[int(place[1:]) - 1]
        return [place, _colour(tile), tile[-1]]
    words, running = [], 0
    if family == "count":
        colour = question.split()[1]
        for index, tile in enumerate(board):
            running += _colour(tile) == colour
            words += [position_word(index), str(running)]
        return words
    for index, tile in enumerate(board):
        digit = int(tile[-1])
        if tile[0] == ADD:
            running = (running + digit) % 10
        elif tile[0] == MULTIPLY:
            running = running * digit % 10
        else:
            running = digit
        words += [position_word(index), str(running)] if index == 0 else [position_word(index), tile, str(running)]
    return words


def _colour(tile: str) -> str:
    return COLOURS[SYMBOLS.index(tile[:-1])]


def _render(
    rng: np.random.Generator, kinds: NDArray[np.int64], digits: NDArray[np.int64], split: Split, config: DataConfig
) -> NDArray[np.uint8]:
    """Pictures of all boards, uint8 [n, rows * 16, 64, 3], from an image of each digit's class drawn at random."""
    used = kinds != EMPTY
    shown, kind = digits[used], kinds[used]
    table, sizes = _class_table(split, config.held_out)
    picked = table[shown, (rng.random(len(shown)) * sizes[shown]).astype(np.int64)]
    augment = config.augment and split == "train"
    ink = (_augmented(rng, picked) if augment else _upsampled()[picked])[..., None]
    ground = _tile_grounds()[kind]
    tiles = ground + ink * (_INK - ground)
    canvas = np.zeros((*kinds.shape, TILE, TILE, 3), np.uint8)
    canvas[used] = tiles + 0.5
    boards = canvas.reshape(len(kinds), -1, COLUMNS, TILE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    return boards.reshape(len(kinds), -1, COLUMNS * TILE, 3)


def _augmented(rng: np.random.Generator, picked: NDArray[np.int64]) -> NDArray[np.float32]:
    """Ink [n, 16, 16] of digits turned by up to 0.25 rad, scaled and shifted by up to 15 %, sheared by up to 0.2."""
    turn, scale, shear, right, down = rng.uniform(-1, 1, (5, len(picked))).astype(np.float32)
    scale, turn = 1 + 0.15 * scale, 0.25 * turn
    cos, sin = scale * np.cos(turn), np.sin(turn)
    rows = [[cos, 0.2 * shear - sin, 0.15 * right], [sin, cos, 0.15 * down]]
    theta = torch.from_numpy(np.array(rows, np.float32).transpose(2, 0, 1).copy())
    images = torch.from_numpy(_digits()[0][picked])[:, None]
    grid = F.affine_grid(theta, [len(picked), 1, TILE, TILE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)[:, 0].numpy()


@cache
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink float32 [n, 8, 8] in 0..1 and labels int64 [n] of the legible digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    kept = _legible(data.data, labels)
    return (data.images[kept] / 16).astype(np.float32), labels[kept]


def _legible(pixels: NDArray[np.float64], labels: NDArray[np.int64], neighbours: int = 5) -> NDArray[np.bool_]:
    """Which digits most of their nearest neighbours read as they are labelled; the same on every machine.

    A board of nine tiles is as legible as its worst digit. Pixels are whole numbers, so distances are exact.
    """
    squares = (pixels**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argsort(axis=1, kind="stable")[:, :neighbours]
    votes = (labels[nearest][:, :, None] == np.arange(10)).sum(axis=1)
    return votes.argmax(axis=1) == labels


@cache
def _upsampled() -> NDArray[np.float32]:
    images = torch.from_numpy(_digits()[0])[:, None]
    return F.interpolate(images, size=(TILE, TILE), mode="bilinear", align_corners=False)[:, 0].numpy()


@cache
def _tile_grounds() -> NDArray[np.float32]:
    """The four kinds of tile without ink, float32 [4, 16, 16, 3], with a darker edge of one pixel."""
    grounds = np.broadcast_to(_GROUND[:, None, None] * _EDGE_SHADE, (4, TILE, TILE, 3)).copy()
    grounds[:, 1:-1, 1:-1] = _GROUND[:, None, None]
    return grounds


@lru_cache(maxsize=8)
def _class_table(split: Split, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image numbers by digit [10, most] and how many there are [10].

    Images are ordered by a hash of their number, which no library's random generator can change; the first
    ``held_out`` of each class are held out.
    """
    labels = _digits()[1]
    order = sorted(range(len(labels)), key=lambda index: hashlib.sha256(f"r4b digits {index}".encode()).digest())
    members: list[list[int]] = []
    for digit in range(10):
        mine = [index for index in order if labels[index] == digit]
        kept = min(max(round(len(mine) * held_out), 1), len(mine) - 1)
        members.append(mine[:kept] if split == "held_out" else mine[kept:])
    sizes = np.array([len(mine) for mine in members])
    table = np.zeros((10, sizes.max()), np.int64)
    for digit, mine in enumerate(members):
        table[digit, : len(mine)] = mine
    return table, sizes

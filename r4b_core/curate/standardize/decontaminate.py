"""Keeping the questions and pictures of benchmarks out of training.

A question is taken for a benchmark's if they have a run of words in common (13 by default, as has been customary since
GPT-3), or, where one is shorter than that, if all words are equal and so is the picture, if there is one. A picture is
taken for a benchmark's by its bytes or its perceptual hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r4b_core.curate.standardize.pictures import Picture
from r4b_core.curate.standardize.settings import DecontaminateSettings
from r4b_core.curate.standardize.signatures import runs

TEXT, IMAGE = "benchmark text", "benchmark image"
_TELLING = 16  # set bits below which a perceptual hash is that of a flat picture, which says nothing
_SHORT_SALT = 0x5B


@dataclass(frozen=True)
class Benchmarks:
    """What benchmarks consist of, each sorted and unique uint64.

    Attributes:
        runs: hashes of runs of words.
        shorts: hashes of whole questions shorter than a run, without a picture or each with its picture's.
        digests: of pictures' bytes, 8 bytes of each.
        phashes: perceptual hashes that say something.
    """

    runs: NDArray[np.uint64]
    shorts: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    phashes: NDArray[np.uint64]

    @classmethod
    def build(
        cls, questions: Iterable[tuple[Sequence[str], Sequence[Picture]]], settings: DecontaminateSettings
    ) -> Benchmarks:
        """Of the words and pictures of their questions."""
        long, short, digests, phashes = [np.zeros(0, np.uint64)], [], [], []
        for tokens, pictures in questions:
            if len(tokens) >= settings.ngram:
                long.append(runs(tokens, settings.ngram))
            elif tokens:
                short += _shorts(tokens, pictures)
            digests += [_low(picture.digest) for picture in pictures]
            phashes += [picture.phash for picture in pictures if picture.phash.bit_count() >= _TELLING]
        made = (np.concatenate(long), *(np.array(values, np.uint64) for values in (short, digests, phashes)))
        return cls(*(np.unique(values) for values in made))

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Benchmarks:
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in ("runs", "shorts", "digests", "phashes")})

    def find(self, tokens: Sequence[str], pictures: Sequence[Picture], settings: DecontaminateSettings) -> str | None:
        """Why a question must not be trained on: "benchmark text", "benchmark image", or None."""
        if len(tokens) >= settings.ngram:
            if _any_in(runs(tokens, settings.ngram), self.runs):
                return TEXT
        elif tokens and _any_in(np.array(_shorts(tokens, pictures), np.uint64), self.shorts):
            return TEXT
        if settings.images and any(self._has_picture(picture, settings.image_distance) for picture in pictures):
            return IMAGE
        return None

    def _has_picture(self, picture: Picture, distance: int) -> bool:
        if _any_in(np.array([_low(picture.digest)], np.uint64), self.digests):
            return True
        if picture.phash.bit_count() < _TELLING:
            return False
        return bool((np.bitwise_count(self.phashes ^ np.uint64(picture.phash)) <= distance).any())


def _shorts(tokens: Sequence[str], pictures: Sequence[Picture]) -> list[int]:
    whole = int(runs(tokens, len(tokens))[0])
    return [whole ^ _low(picture.digest) for picture in pictures] or [whole ^ _SHORT_SALT]


def _any_in(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> bool:
    if not len(known):
        return False
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return bool((known[places] == values).any())


def _low(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")

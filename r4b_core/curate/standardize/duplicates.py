"""Which records repeat an earlier one, over all partitions at once: the same key, the same content, or nearly so.

Earlier is by partition and place, so the answer does not depend on how many processes made the signatures, nor on
where partitions begin. Signatures stay on disk; what is in memory is some 70 bytes a record.

Near duplicates are texts of similar words with the same numbers in them, and pictures of similar perceptual hashes. A
record is dropped if *any* earlier one is near it, dropped itself or not. Pairs are looked for where a band of the
MinHash and a part of the picture's hash are equal: for texts of similarity 0.8 that misses 2 pairs in 10,000, for
pictures within the distance none, because of d + 1 parts of a hash that differs in d bits one does not differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r4b_core.curate.standardize.settings import DuplicateSettings
from r4b_core.curate.standardize.signatures import BANDS, PERMUTATIONS, SIGNATURE, bands

REASONS = ("", "duplicate id", "duplicate", "near duplicate")
KEPT, SAME_KEY, SAME, NEAR = range(4)
DECISION = np.dtype([("code", "u1"), ("partition", "<i4"), ("row", "<i8")])
_BLOCK = 1024


class _All:
    """The signatures of all partitions, one after the other. They stay in their files: a column of one file at a time
    is looked at, and single MinHashes by their place."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        sizes = []
        for file in files:
            part = np.load(file, mmap_mode="r")
            if part.dtype != SIGNATURE:
                raise ValueError(f"{file}: no signatures of this version")
            sizes.append(len(part))
        self.begins = np.cumsum([0, *sizes])
        self._open = lru_cache(maxsize=16)(self._load)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def column(self, name: str) -> NDArray:
        return np.concatenate([np.array(self._load(part)[name]) for part in range(len(self._files))])

    def band(self, band: int) -> NDArray[np.uint64]:
        return np.concatenate([bands(self._load(part)["minhash"], band) for part in range(len(self._files))])

    def minhash(self, index: int) -> NDArray[np.uint32]:
        part, place = self.place(index)
        return np.array(self._open(part)["minhash"][place])

    def row(self, index: int) -> int:
        """In its file of origin."""
        part, place = self.place(index)
        return int(self._open(part)["row"][place])

    def place(self, index: int) -> tuple[int, int]:
        """(partition, place in it)"""
        part = int(np.searchsorted(self.begins, index, "right")) - 1
        return part, index - int(self.begins[part])

    def _load(self, part: int) -> NDArray:
        return np.load(self._files[part], mmap_mode="r")


def find_duplicates(files: Sequence[Path], settings: DuplicateSettings) -> list[NDArray]:
    """What becomes of each record: for each file of signatures an array of ``DECISION`` [n].

    ``partition`` and ``row`` tell the earlier record: its partition, and its row in the file of origin.
    """
    signatures = _All(files)
    code = np.zeros(len(signatures), np.uint8)
    earlier = np.full(len(signatures), -1, np.int64)
    if len(signatures):
        _mark_repeats(signatures.column("key"), SAME_KEY, code, earlier)
        if settings.exact:
            _mark_repeats(signatures.column("exact"), SAME, code, earlier)
        if settings.near:
            _mark_near(signatures, settings, code, earlier)
    return [_decisions(signatures, part, code, earlier) for part in range(len(files))]


def _mark_repeats(hashes: NDArray, reason: int, code: NDArray, earlier: NDArray) -> None:
    """Mark what has the hash of an earlier record that is kept so far."""
    kept = np.flatnonzero(code == KEPT)
    low, high = hashes[kept, 0], hashes[kept, 1]
    order = np.lexsort((kept, high, low))
    same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    first = np.maximum.accumulate(np.where(np.r_[False, same], 0, np.arange(len(order))))
    repeats = np.flatnonzero(np.r_[False, same])
    code[kept[order[repeats]]] = reason
    earlier[kept[order[repeats]]] = kept[order[first[repeats]]]


def _mark_near(signatures: _All, settings: DuplicateSettings, code: NDArray, earlier: NDArray) -> None:
    kept = np.flatnonzero(code == KEPT)
    phash, others, numbers = (signatures.column(name)[kept] for name in ("phash", "others", "numbers"))
    parts = settings.image_distance + 1
    edges = [64 * part // parts for part in range(parts + 1)]
    for band in range(BANDS):
        # Equal in all three, but for one chance in 2**64.
        text = signatures.band(band)[kept] ^ others ^ numbers
        for low, high in zip(edges, edges[1:], strict=False):
            bits = (phash >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
            for bucket in _buckets(text, bits):
                _compare_bucket(signatures, settings, kept[bucket], phash[bucket], code, earlier)


def _buckets(text: NDArray[np.uint64], bits: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Groups of two and more places that are equal in both, each in ascending order."""
    order = np.lexsort((np.arange(len(text)), bits, text))
    same = (text[order][1:] == text[order][:-1]) & (bits[order][1:] == bits[order][:-1])
    starts = np.flatnonzero(np.r_[True, ~same])
    ends = np.r_[starts[1:], len(order)]
    return [order[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


def _compare_bucket(
    signatures: _All,
    settings: DuplicateSettings,
    members: NDArray[np.int64],
    phash: NDArray[np.uint64],
    code: NDArray,
    earlier: NDArray,
) -> None:
    minhashes: dict[int, NDArray[np.uint32]] = {}

    def minhash(place: int) -> NDArray[np.uint32]:
        if place not in minhashes:
            minhashes[place] = signatures.minhash(int(members[place]))
        return minhashes[place]

    needed = settings.text_similarity * PERMUTATIONS
    for place in range(1, len(members)):
        if code[members[place]] != KEPT:
            continue  # another bucket told
        for start in range(0, place, _BLOCK):
            block = slice(start, min(place, start + _BLOCK))
            near = np.bitwise_count(phash[block] ^ phash[place]) <= settings.image_distance
            alike = (
                other
                for other in (start + np.flatnonzero(near)).tolist()
                if np.count_nonzero(minhash(other) == minhash(place)) >= needed
            )
            if (match := next(alike, None)) is not None:
                code[members[place]], earlier[members[place]] = NEAR, members[match]
                break


def _decisions(signatures: _All, part: int, code: NDArray, earlier: NDArray) -> NDArray:
    begin, end = signatures.begins[part], signatures.begins[part + 1]
    made = np.zeros(end - begin, DECISION)
    made["code"] = code[begin:end]
    for place in np.flatnonzero(made["code"]):
        winner = int(earlier[begin + place])
        made["partition"][place], made["row"][place] = signatures.place(winner)[0], signatures.row(winner)
    return made

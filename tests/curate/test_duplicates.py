"""Repetitions over all partitions: against the definition written out, and whatever the partitions are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from r4b_core.curate.standardize.duplicates import KEPT, NEAR, SAME, SAME_KEY, find_duplicates
from r4b_core.curate.standardize.pictures import Picture
from r4b_core.curate.standardize.settings import DuplicateSettings
from r4b_core.curate.standardize.signatures import PERMUTATIONS, SIGNATURE, min_hash, signature
from r4b_core.curate.standardize.text import words
from r4b_core.data.records import Record

LONG = "If the radius of the circle is five then what is the area of the shaded region shown in the diagram below"


def sign(rows: Sequence[tuple[str, str, int]]) -> np.ndarray:
    """Signatures of (id, question, perceptual hash of its picture; 0 for none)."""
    made = []
    for row, (name, question, phash) in enumerate(rows):
        pictures = [Picture(b"", b"%016d" % row, phash)] if phash else []
        made.append(signature(Record(name, "s", question), pictures, row))
    return np.array(made, SIGNATURE)


def codes(
    signatures: np.ndarray, folder: Path, cuts: Sequence[int] = (), settings: DuplicateSettings | None = None
) -> tuple[list[int], list[int]]:
    """(code, row of the earlier record) of each, cut into partitions at some places."""
    files = []
    for i, part in enumerate(np.split(signatures, cuts)):
        files.append(folder / f"{i}.npy")
        np.save(files[-1], part)
    found = np.concatenate(find_duplicates(files, settings or DuplicateSettings()))
    return found["code"].tolist(), found["row"].tolist()


def test_each_kind_of_repetition(tmp_path: Path) -> None:
    phash = 0x123456789ABCDEF0
    rows = [
        ("a", LONG, phash),
        ("a", "Another question entirely?", 0),  # the id again
        ("b", LONG + " please", phash ^ 0b1011),  # near in both
        ("c", LONG + " please", ~phash & (1 << 64) - 1),  # another picture
        ("d", LONG.replace("five", "7"), phash),  # another number
        ("e", "What is shown here?", 0),
        ("f", "what is shown HERE", 0),  # the same words
        ("g", LONG, 0),  # no picture
    ]
    found, earlier = codes(sign(rows), tmp_path)
    assert found == [KEPT, SAME_KEY, NEAR, KEPT, KEPT, KEPT, SAME, KEPT]
    assert earlier == [0, 0, 0, 0, 0, 0, 5, 0]
    off = DuplicateSettings(exact=False, near=False)
    assert codes(sign(rows), tmp_path, (), off)[0] == [KEPT, SAME_KEY, *[KEPT] * 6]


def test_the_same_words_with_other_pictures_are_other_questions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(str(i), "Find x.", int(rng.integers(1, 2**63))) for i in range(50)]
    assert codes(sign(rows), tmp_path)[0] == [KEPT] * 50


def random_rows(count: int) -> list[tuple[str, str, int]]:
    """A few texts and pictures, each with small changes: many pairs on either side of the limits."""
    rng = np.random.default_rng(1)
    texts = [[f"w{n}" for n in rng.integers(0, 500, 30)] for _ in range(8)]
    hashes = rng.integers(1, 2**63, 6)
    rows = []
    for i in range(count):
        tokens = list(texts[rng.integers(8)])
        for _ in range(rng.integers(0, 3)):
            tokens[rng.integers(30)] = "".join(rng.choice(list("xyz"), 4))
        phash = int(hashes[rng.integers(6)])
        for bit in rng.integers(0, 63, rng.integers(0, 4)):
            phash ^= 1 << int(bit)
        rows.append((str(i), " ".join(tokens), phash))
    return rows


def near_by_definition(a: np.void, b: np.void, settings: DuplicateSettings) -> bool:
    alike = np.count_nonzero(a["minhash"] == b["minhash"]) >= settings.text_similarity * PERMUTATIONS
    near = int(a["phash"] ^ b["phash"]).bit_count() <= settings.image_distance
    return bool(alike and near and a["numbers"] == b["numbers"] and a["others"] == b["others"])


def test_near_duplicates_are_those_of_the_definition(tmp_path: Path) -> None:
    """Against every pair looked at."""
    rows, settings = sign(random_rows(250)), DuplicateSettings(exact=False)
    expected = [any(near_by_definition(rows[i], rows[j], settings) for j in range(i)) for i in range(len(rows))]
    found, earlier = codes(rows, tmp_path, (), settings)
    assert 30 < sum(expected) < 200
    assert [code == NEAR for code in found] == expected
    for i in np.flatnonzero(expected):
        assert earlier[i] < i and near_by_definition(rows[i], rows[earlier[i]], settings)


def test_partitions_leave_no_trace(tmp_path: Path) -> None:
    signatures = sign(random_rows(200))
    whole = codes(signatures, tmp_path)
    for cuts in ((100,), (1, 2, 3, 50, 199), tuple(range(0, 200, 7))):
        assert codes(signatures, tmp_path, cuts) == whole
    assert codes(signatures[:0], tmp_path) == ([], [])


def test_a_crowd_of_one_kind_is_quick(tmp_path: Path) -> None:
    """5,000 near duplicates: each is compared with the first block, not with all."""
    signatures = np.repeat(sign([("a", LONG, 5)]), 5000)
    signatures["key"] = np.arange(10000).reshape(5000, 2)
    signatures["exact"] = np.arange(10000).reshape(5000, 2)
    assert codes(signatures, tmp_path)[0] == [KEPT, *[NEAR] * 4999]


def test_min_hash_estimates_similarity_as_datasketch_does() -> None:
    datasketch = pytest.importorskip("datasketch")
    rng = np.random.default_rng(2)
    ours, theirs, truth = [], [], []
    for changes in range(0, 20, 2):
        a = [f"w{n}" for n in rng.integers(0, 10**6, 60)]
        b = list(a)
        for place in rng.choice(60, changes, replace=False):
            b[place] = "other"
        sets = [{" ".join(x[i : i + 3]) for i in range(58)} for x in (a, b)]
        truth.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        ours.append((min_hash(a) == min_hash(b)).mean())
        sketches = [datasketch.MinHash(PERMUTATIONS) for _ in sets]
        for sketch, members in zip(sketches, sets, strict=True):
            sketch.update_batch([member.encode() for member in members])
        theirs.append(sketches[0].jaccard(sketches[1]))
    assert np.abs(np.subtract(ours, truth)).max() < 0.2
    assert np.abs(np.subtract(ours, truth)).mean() < np.abs(np.subtract(theirs, truth)).mean() + 0.04


def test_min_hash_of_words() -> None:
    assert (min_hash(words(LONG)) == min_hash(words(LONG + " please"))).mean() > 0.8
    assert (min_hash(words(LONG)) == min_hash(words(LONG[::-1]))).mean() < 0.2
    assert min_hash([]).shape == min_hash(["a"]).shape == (PERMUTATIONS,)

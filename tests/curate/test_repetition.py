from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_core.curate.verify.repetition import repeated, repeated_reference


@given(st.lists(st.sampled_from("ab"), max_size=60), st.integers(1, 6), st.integers(2, 4))
@settings(max_examples=200, deadline=None)
def test_as_counting_all_of_them(words: list[str], n: int, times: int) -> None:
    found, wanted = repeated(words, n, times), repeated_reference(words, n, times)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert sum(tuple(words[k : k + n]) == found for k in range(len(words))) >= times


def passage(repeats: int, size: int) -> list[str]:
    words = [f"w{k}" for k in range(3000)]
    for k in range(repeats):
        words[700 * k + 100 : 700 * k + 100] = [f"again{j}" for j in range(size)]
    return words


@pytest.mark.parametrize(
    ("repeats", "size", "found"), [(3, 50, True), (2, 50, False), (3, 49, False), (4, 80, True), (0, 0, False)]
)
def test_fifty_words_three_times(repeats: int, size: int, found: bool) -> None:
    gram = repeated(passage(repeats, size))
    assert (gram is not None) == found
    assert gram is None or gram[0].startswith("again") and len(gram) == 50


@pytest.mark.parametrize("length", [0, 1, 49, 50, 51])
def test_short_texts_do_not_repeat(length: int) -> None:
    assert repeated(["w"] * length) is None


def test_overlaps_count() -> None:
    assert repeated(["w"] * 52) == ("w",) * 50


def test_long_texts_take_little_time() -> None:
    start = time.process_time()
    assert repeated([f"w{k % 997}{k}" for k in range(200_000)]) is None
    assert repeated(["same"] * 20_000) is not None
    assert time.process_time() - start < 5

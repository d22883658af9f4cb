"""The bars of the verifier: precision and recall on labelled pairs, and nothing adversarial ever called right."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from r4b_core.curate.verify.confusion import ADVERSARIAL, Confusion, by_rules, by_substring, load_confusions, tally
from r4b_core.rewards.verdict import Outcome, Verdict
from r4b_core.rewards.verify import Verifier

TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def pairs() -> list[Confusion]:
    return load_confusions()


@pytest.fixture(scope="module")
def verdicts(pairs: list[Confusion]) -> list[Verdict]:
    with Verifier(workers=2, timeout_s=TIMEOUT_S) as verifier:
        return by_rules(pairs, verifier)


def test_the_set_is_large_and_has_every_kind(pairs: list[Confusion]) -> None:
    assert len(pairs) >= 300 and len({pair.id for pair in pairs}) == len(pairs)
    assert sum(pair.family == ADVERSARIAL for pair in pairs) >= 60
    assert {pair.label for pair in pairs} == {"right", "wrong", "undecidable"}
    assert min(Counter(pair.family for pair in pairs).values()) >= 8
    assert not any(pair.label == "right" for pair in pairs if pair.family == ADVERSARIAL)


def test_precision_and_recall(pairs: list[Confusion], verdicts: list[Verdict]) -> None:
    found = tally(pairs, [verdict.outcome for verdict in verdicts])
    assert found.precision >= 0.995
    assert found.recall >= 0.97
    assert found.wrong_precision >= 0.995


def test_nothing_adversarial_is_right(pairs: list[Confusion], verdicts: list[Verdict]) -> None:
    fooled = [
        pair.id
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if pair.family == ADVERSARIAL and verdict.outcome is Outcome.RIGHT
    ]
    assert not fooled


def test_what_nobody_can_know_is_not_called_right(pairs: list[Confusion], verdicts: list[Verdict]) -> None:
    claimed = [
        pair.id
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if pair.label == "undecidable" and verdict.outcome is Outcome.RIGHT
    ]
    assert not claimed


def test_substring_match_is_no_rival(pairs: list[Confusion]) -> None:
    found = tally(pairs, [by_substring(pair) for pair in pairs])
    assert found.precision < 0.6 and found.false_rights > 100


def test_the_tally_counts_by_label() -> None:
    pairs = [
        Confusion(str(k), "f", label, "1", "1") for k, label in enumerate(("right", "right", "wrong", "undecidable"))
    ]
    found = tally(pairs, [Outcome.RIGHT, Outcome.UNDECIDED, Outcome.RIGHT, Outcome.WRONG])
    assert (found.precision, found.recall, found.undecided, found.false_rights) == (0.5, 0.5, 0.25, 1)
    assert found.wrong_precision == 1.0


@pytest.mark.parametrize(
    "hostile",
    [
        "7" * 10_000_000,
        "(" * 1900,
        "\\frac{" * 300,
        "\\frac{1}{" * 150 + "2" + "}" * 150,
        "9**9**9",
        "2^{2^{2^{2^{99}}}}",
        "1e999999999",
        "\\cos(9^{9^{9^9}})",
        "A , " * 490,
        "1,111," * 330,
        "±" * 1900,
        "x<" * 900,
        "1:" * 900,
        "{" * 900 + "}" * 900,
        "(1,2)∪" * 300,
        "sqrt" * 450,
        "a and " * 300,
    ],
    ids=lambda text: f"{text[:12]}... {len(text)}",
)
def test_a_hostile_answer_is_cut_off_and_costs_no_other_record(hostile: str) -> None:
    with Verifier(workers=1, timeout_s=TIMEOUT_S) as verifier:
        if "cos" in hostile:
            verifier.verify("\\sin(\\pi/6)", "0.5")  # starting a process is not counted
        start = time.monotonic()
        first, second = verifier.verify_many([(hostile, "7"), ("1/2", "0.5")])
        assert time.monotonic() - start < 5
        assert first.outcome is not Outcome.RIGHT and second.outcome is Outcome.RIGHT

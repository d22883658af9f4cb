"""What must hold of the rules for all answers: they are sure of nothing false, whatever the formatting."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_core.rewards.algebra import TooLarge, Unreadable, read_value
from r4b_core.rewards.choices import read_options
from r4b_core.rewards.rules import compare
from r4b_core.rewards.units import read_unit
from r4b_core.rewards.verdict import Outcome
from r4b_core.rewards.words import read_number_word

INTEGERS = st.integers(-(10**6), 10**6)
FORMATS = st.sampled_from(
    [
        "{}",
        "${}$",
        " {} ",
        "{}.",
        "\\boxed{{{}}}",
        "\\({}\\)",
        "**{}**",
        "\\text{{{}}}",
        "The answer is {}",
        "x = {}",
        "{{{}}}",
    ]
)


def is_right(answer: str, gold: str, question: str | None = None) -> bool:
    verdict = compare(answer, gold, question)
    return verdict is not None and verdict.outcome is Outcome.RIGHT


@given(INTEGERS, INTEGERS, FORMATS, FORMATS)
@settings(deadline=None)
def test_integers_are_right_where_they_are_equal(said: int, meant: int, left: str, right: str) -> None:
    verdict = compare(left.format(said), right.format(meant))
    assert verdict is not None and (verdict.outcome is Outcome.RIGHT) == (said == meant)
    assert is_right(left.format(said), right.format(said))


@given(st.fractions(max_denominator=60), st.fractions(max_denominator=60), st.booleans())
@settings(deadline=None)
def test_fractions_are_right_where_they_are_equal(said: Fraction, meant: Fraction, latex: bool) -> None:
    over, under = said.numerator, said.denominator
    answer = f"\\frac{{{over}}}{{{under}}}" if latex else f"{over}/{under}"
    assert is_right(answer, f"{meant.numerator}/{meant.denominator}") == (said == meant)
    assert is_right(answer, answer)


@given(st.decimals(-1000, 1000, places=4), st.decimals(-1000, 1000, places=2))
@settings(deadline=None)
def test_a_decimal_is_right_only_where_it_rounds_to_the_reference(said: object, meant: object) -> None:
    if is_right(str(said), str(meant)):
        assert abs(Fraction(str(said)) - Fraction(str(meant))) <= Fraction(1, 200)


@given(INTEGERS, INTEGERS, st.sampled_from(["cm", "m^2", "kg", "dollars", "apples", "°", "%", "km/h"]))
@settings(deadline=None)
def test_a_unit_does_not_make_another_number_right(said: int, meant: int, unit: str) -> None:
    if abs(said) != 100 * abs(meant) and abs(meant) != 100 * abs(said):
        assert not is_right(f"{said} {unit}", str(meant)) or said == meant
        assert not is_right(str(said), f"{meant} {unit}") or said == meant
    assert is_right(f"{said} {unit}", f"{meant} {unit}") == (said == meant)


@given(st.text(max_size=60), st.text(max_size=60), st.none() | st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_verdict_and_no_exception(answer: str, gold: str, question: str | None) -> None:
    verdict = compare(answer, gold, question)
    assert verdict is None or verdict.reason
    same = compare(gold, gold, question)
    assert same is None or same.outcome is not Outcome.WRONG or not gold.strip(" \n\t.,;")


_PIECES = st.sampled_from(
    list("0123456789+-*/^(){}[]|,;:.%$°πx=<>≤≥±∪ ")
    + ["\\frac", "\\sqrt", "{1}", "{2}", "1/2", " or ", " and ", "cm", "A.", "(B)"]
)


@given(st.lists(_PIECES, max_size=14).map("".join), st.lists(_PIECES, max_size=14).map("".join))
@settings(max_examples=500, deadline=None)
def test_any_expression_gets_a_verdict_and_no_exception(answer: str, gold: str) -> None:
    compare(answer, gold, "Which? A. 1 B. 2")
    compare(answer, "7")


_EXPRESSIONS = st.recursive(
    st.integers(0, 12).map(str) | st.sampled_from(["x", "y", "pi", "sqrt(2)", "sqrt(12)"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: "({} {} {})".format(*parts)),
    max_leaves=6,
)


@given(_EXPRESSIONS, _EXPRESSIONS)
@settings(max_examples=80, deadline=None)
def test_normal_forms_agree_with_sympy(left: str, right: str) -> None:
    equal = sympy.expand(sympy.sympify(left) - sympy.sympify(right)) == 0
    assert (read_value(left).terms == read_value(right).terms) == equal
    assert read_value(left).terms == read_value(str(sympy.expand(sympy.sympify(left)))).terms


@pytest.mark.parametrize(
    "text", ["cat", "x/2y", "2 3", "((1)", "1+", "\\sin(1)", "x^y", "1/(x+1)", "\\sqrt{x}", "5!", ""]
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        read_value(text)


@pytest.mark.parametrize("text", ["9^{99999}", "9**9**9", "10^{4999999}", "1e99999", "(3/7)^{9999}"])
def test_large_values_are_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises((TooLarge, Unreadable)):
        read_value(text)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which? A. red B. blue", {"A": "red", "B": "blue"}),
        ("Which?\n(A) 1\n(B) 2\n(C) 3\nThink.", {"A": "1", "B": "2", "C": "3"}),
        ("Points A. and B. lie on a line. Which?\nA) 1 cm\nB) 2 cm", {"A": "1 cm", "B": "2 cm"}),
        ("Options: A: x < 1, B: x > 1", {"A": "x < 1", "B": "x > 1"}),
        ("Line AB meets C. How long is it?", {}),
        ("A. only one", {}),
        ("", {}),
    ],
)
def test_options_are_read(question: str, options: dict[str, str]) -> None:
    assert read_options(question) == options


@pytest.mark.parametrize(
    ("left", "right", "factor"),
    [
        ("km/h", "m/s", Fraction(5, 18)),
        ("square centimeters", "cm^2", 1),
        ("L", "cm^3", 1000),
        ("kJ", "J", 1000),
        ("N", "kg*m/s^2", 1),
        ("hours", "min", 60),
        ("feet", "in", 12),
        ("m per second", "m/s", 1),
    ],
)
def test_units_convert_exactly(left: str, right: str, factor: Fraction) -> None:
    first, second = read_unit(left), read_unit(right)
    assert first is not None and second is not None and first.dimension == second.dimension
    assert first.scale == second.scale * factor


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("zero", 0),
        ("twenty-five", 25),
        ("one hundred and five", 105),
        ("two thousand three hundred", 2300),
        ("minus four", -4),
        ("one half", Fraction(1, 2)),
        ("three quarters", Fraction(3, 4)),
        ("二十五", 25),
        ("一百", 100),
        ("five twenty", None),
        ("apple", None),
        ("and", None),
        ("", None),
    ],
)
def test_number_words(words: str, number: Fraction | None) -> None:
    assert read_number_word(words) == number


def test_comparison_takes_little_time() -> None:
    pieces = ("A , ", "1 or ", "(", "x=", "1:2:", "±", "1,111,", "cm/", "yes, ", "not ", "\\frac{1}{", "∪", "≤", "a. ")
    start = time.process_time()
    for piece in pieces:
        for gold in ("7", "B", "blue", "(1,2)", "x=1, y=2", "5 cm", "yes"):
            compare((piece * 2000)[:1999], gold, "Which? A. 1 B. 2")
    assert time.process_time() - start < 5

"""The rules that clean text, one by one, and that none of them can be made to run for ever."""

from __future__ import annotations

import time

import pytest

from r4b_core.curate.standardize.text import (
    clean,
    drop_control,
    drop_links,
    drop_numbering,
    drop_scores,
    drop_watermarks,
    find_answer,
    foreign_share,
    is_empty,
    is_weak,
    tidy_whitespace,
    words,
)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\u200bb\x00c\ufeff", "abc"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("left \u202eright", "left right"),
        ("e\u0301", "é"),
        ("tab\tstays\n", "tab\tstays\n"),
    ],
)
def test_control_characters_go(raw: str, cleaned: str) -> None:
    assert drop_control(raw) == cleaned


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("See [the table](https://a.b/c?d=1) here", "See the table here"),
        ("Look (source: http://x.y/z) now", "Look now"),
        ("![alt](www.x.org) What?", "alt What?"),
        ("Taken from www.example.com: why?", "Taken from why?"),
        ("The ratio a/b and f(x) stay", "The ratio a/b and f(x) stay"),
    ],
)
def test_links_go_and_their_words_stay(raw: str, cleaned: str) -> None:
    assert tidy_whitespace(drop_links(raw)) == cleaned


@pytest.mark.parametrize(
    "line",
    [
        "Downloaded from papers.example",
        "© 2020 A Publisher",
        "Copyright 2019 B.",
        "Page 3 of 12",
        "All rights reserved.",
    ],
)
def test_watermark_lines_go(line: str) -> None:
    assert drop_watermarks(f"What is x?\n{line}\nA. 1").replace("\n\n", "\n") == "What is x?\nA. 1"
    assert drop_watermarks(f"Why does it say '{line}' there, and what does that mean?") != ""


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("12. What is x?", "What is x?"),
        ("<image>\n(3) What is x?", "<image>\nWhat is x?"),
        ("Question 7: why?", "why?"),
        ("Q3) why?", "why?"),
        ("Example 2. Let x be 3.", "Let x be 3."),
        ("3、求x", "求x"),
        ("3.5 kg of salt", "3.5 kg of salt"),
        ("(1) Find a. (2) Find b.", "(1) Find a. (2) Find b."),
        ("1. red 2. blue: which?", "1. red 2. blue: which?"),
        ("2020 was a year", "2020 was a year"),
        ("(3, 4) is a point", "(3, 4) is a point"),
    ],
)
def test_the_number_of_a_question_goes_and_those_of_its_parts_stay(raw: str, cleaned: str) -> None:
    assert drop_numbering(raw) == cleaned


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("What? (5 points)", "What?"),
        ("[3 marks] What?", "What?"),
        ("What? (This question is worth 10 pts.)", "What?"),
        ("(本题满分12分) 求x", "求x"),
        ("What? (2.5 points each)", "What?"),
        ("passes through the points (5, 3)", "passes through the points (5, 3)"),
        ("f(5) points up", "f(5) points up"),
    ],
)
def test_scores_go(raw: str, cleaned: str) -> None:
    assert tidy_whitespace(drop_scores(raw)) == cleaned


def test_whitespace_is_single() -> None:
    assert tidy_whitespace("  a\u00a0\u3000 b \t\n  c\n\n\n\nd ") == "a b\nc\n\nd"


def test_rules_run_together_and_each_can_be_left_out() -> None:
    raw = "<image>\n12.  What is \x00x? (5 points) see http://a.b/c"
    assert clean(raw) == "<image>\nWhat is x? see" or clean(raw) == "<image>\nWhat is x?"
    assert clean(raw, ["scores", "whitespace"]).startswith("<image>\n12. What is \x00x? see")
    assert clean(clean(raw)) == clean(raw)


@pytest.mark.parametrize(
    "weak",
    ["See the figure.", "As shown in the figure", "<image>", "Solve", "N/A", "Question:"],
)
def test_weak_questions(weak: str) -> None:
    assert is_weak(weak) or is_empty(weak)


@pytest.mark.parametrize(
    "strong", ["What is shown in the figure?", "Find x.", "Solve 3x = 2", "<image> Count the figures", "图中有几个点?"]
)
def test_questions_that_ask_something(strong: str) -> None:
    assert not is_weak(strong) and not is_empty(strong)


@pytest.mark.parametrize(
    ("answer", "solution", "found"),
    [
        ("42", "anything", "42"),
        (None, "Thus \\boxed{3} and then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("N/A", "The answer is **42**.", "42"),
        (None, "x\n<answer> B </answer>", "B"),
        (None, "Final answer: 7 cm", "7 cm"),
        (None, "12 apples", "12 apples"),
        (None, "first\nsecond", None),
        ("See solution", None, None),
        ("answers may vary", None, None),
        ("略", None, None),
        (None, None, None),
        ("x" * 500, None, None),
        (" \u200b ", "\\boxed{ }", None),
    ],
)
def test_answers_are_found_or_are_none(answer: str | None, solution: str | None, found: str | None) -> None:
    assert find_answer(answer, solution, 400) == found


def test_foreign_letters_are_those_that_are_neither_latin_nor_greek() -> None:
    assert foreign_share("Find the angle α of café 3") == 0
    assert foreign_share("求x的值") == 0.75
    assert foreign_share("Найди x") > 0.8
    assert foreign_share("123") == 0


def test_words_tell_numbers_and_signs_apart() -> None:
    assert words("What's 2+3?") == words("  what s\n2 + 3")
    assert words("2+3") != words("2-3")
    assert words("1.5") != words("15")
    assert words("<image>") == []


@pytest.mark.parametrize(
    "evil",
    ["(" * 40000, "[" * 40000 + "](", "see " * 30000, "https://" * 20000, "answer is " * 20000, " \n" * 50000]
    + ["<answer>" * 20000, "1. " * 30000, "© " * 30000, " " * 100000 + "www.", "( " * 50000 + "www.", "{" * 50000]
    + ["source :" * 20000 + "www.", "\\boxed{" * 20000, "q 1 " * 30000, "a" * 200000, "12" * 100000],
)
def test_no_text_takes_long(evil: str) -> None:
    start = time.process_time()
    cleaned = clean(evil)
    is_weak(cleaned)
    find_answer(evil, evil, 400)
    words(evil)
    assert time.process_time() - start < 1

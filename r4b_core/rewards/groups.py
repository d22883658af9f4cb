"""Answers of several parts: tuples, intervals, sets, unions, plain lists, ±, and inequalities read as intervals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from r4b_core.rewards.text import closing, split_outside
from r4b_core.rewards.verdict import Outcome, Verdict, right, undecided, wrong

_MAX_ITEMS = 32
_COMMA = re.compile(r"\s*[,;]\s*")
_SPACED_COMMA = re.compile(r"\s*(?:,\s|;)\s*")
_LIST = re.compile(r"\s*[,;]\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+|\s*&\s*")
_SPACED_LIST = re.compile(r"\s*(?:,\s|;)\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+|\s*&\s*")
_GROUPED_DIGITS = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
_UNION = re.compile(r"\s*∪\s*|\s+U\s+|(?<=[)\]])\s*U\s*(?=[(\[])")
_BUILDER = re.compile(r"[⟨{]\s*[a-zA-Z]\s*(?:∈\s*\S+\s*)?[|:]\s*(.+)[⟩}]")
_MEMBER = re.compile(r"[A-Za-z]\s*∈\s*")
_RELATION = re.compile(r"\s*([<>≤≥])\s*")
_BOUND = re.compile(r"[A-Za-z]|\\[a-z]+")
_TAKES_ALL = re.compile(r"\b(?:solv\w+|roots?|solutions?|zeros?|all|values|find x|which of)\b", re.IGNORECASE)
_LETTER_OR_NUMBER = re.compile(r"[^\s]{1,24}")


class Kind(StrEnum):
    SET = "set"
    UNION = "union"
    BRACKETS = "brackets"
    LIST = "list"


@dataclass(frozen=True)
class Group:
    """Several parts.

    Attributes:
        kind: what holds them together; a set and a union have no order.
        brackets: opening and closing bracket of BRACKETS.
    """

    kind: Kind
    items: tuple[str, ...]
    brackets: str = ""


Compare = Callable[[str, str], Verdict | None]


def read_group(text: str) -> Group | None:
    """The parts of a text in the notation of `text.clean`; None where it has no parts."""
    text = _MEMBER.sub("", text, count=1) if "∈" in text else text
    if builder := _BUILDER.fullmatch(text):
        text = builder[1].strip()
    if text == "∅":
        return Group(Kind.SET, ())
    if "∪" in text or " U " in text or "U(" in text:
        parts = split_outside(text, _UNION)
        if len(parts) > 1 and all(part and (part[0] in "([{⟨") for part in parts):
            return Group(Kind.UNION, tuple(parts))
    if any(sign in text for sign in "<>≤≥"):
        return _inequality(text)
    if text[:1] in ("(", "[", "{", "⟨") and closing(text, 0) == len(text) - 1:
        return _bracketed(text)
    if "±" in text:
        return Group(Kind.SET, (text.replace("±", "+"), text.replace("±", "-"))) if text.count("±") == 1 else None
    if "," in text or ";" in text or " and " in text or " or " in text or "&" in text:
        items = split_outside(text, _list_separator(text))
        if 1 < len(items) and all(items):
            return Group(Kind.LIST, tuple(items))
    return None


def _list_separator(text: str) -> re.Pattern[str]:
    """Where a comma also groups digits, only a comma before a blank separates."""
    return _SPACED_LIST if _GROUPED_DIGITS.search(text) and (", " in text or ";" in text) else _LIST


def _bracketed(text: str) -> Group | None:
    inner = text[1:-1].strip()
    comma = _SPACED_COMMA if _GROUPED_DIGITS.search(inner) and ", " in inner else _COMMA
    items = tuple(split_outside(inner, comma)) if inner else ()
    if text[0] in "{⟨":
        return Group(Kind.SET, items)
    if len(items) < 2 and text[0] == "(":
        return None
    return Group(Kind.BRACKETS, items, text[0] + text[-1])


def _inequality(text: str) -> Group | None:
    """x < 3, 3 > x, 1 ≤ x < 2 as intervals."""
    parts = _RELATION.split(text)
    if len(parts) == 3:
        left, sign, over = parts
        if _BOUND.fullmatch(over) and not _BOUND.fullmatch(left):
            left, over, sign = over, left, {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[sign]
        if not _BOUND.fullmatch(left) or not over:
            return None
        if sign in "<≤":
            return Group(Kind.BRACKETS, ("-∞", over), "(" + (")" if sign == "<" else "]"))
        return Group(Kind.BRACKETS, (over, "∞"), ("(" if sign == ">" else "[") + ")")
    if len(parts) == 5:
        low, first, middle, second, high = parts
        if not _BOUND.fullmatch(middle) or (first in "<≤") != (second in "<≤"):
            return None
        if first in ">≥":
            low, first, second, high = high, second, first, low
        strict = (first in "<>", second in "<>")
        return Group(Kind.BRACKETS, (low, high), ("(" if strict[0] else "[") + (")" if strict[1] else "]"))
    return None


def compare_groups(answer: Group | None, gold: Group | None, question: str, compare: Compare) -> Verdict | None:
    """The verdict where the reference or the answer has parts; None where the parts cannot be compared."""
    for group in (answer, gold):
        if group is not None and len(group.items) > _MAX_ITEMS:
            return undecided(f"more than {_MAX_ITEMS} parts")
    if answer is None or gold is None:
        return None
    if answer.kind is Kind.BRACKETS and gold.kind is Kind.BRACKETS:
        return _brackets(answer, gold, compare)
    kinds = {answer.kind, gold.kind}
    if kinds in ({Kind.SET}, {Kind.UNION}, {Kind.SET, Kind.LIST}):
        return _unordered(answer.items, gold.items, compare)
    if kinds == {Kind.LIST}:
        verdict = _ordered(answer.items, gold.items, compare)
        if verdict is None or verdict.outcome is not Outcome.WRONG:
            return verdict
        permuted = _unordered(answer.items, gold.items, compare)
        if permuted is None or permuted.outcome is not Outcome.RIGHT:
            return permuted
        if _TAKES_ALL.search(question) or all("=" in item for item in (*answer.items, *gold.items)):
            return right("same parts in another order")
        return undecided("same parts in another order")
    if kinds == {Kind.BRACKETS, Kind.LIST}:
        verdict = _ordered(answer.items, gold.items, compare)
        if verdict is not None and verdict.outcome is Outcome.WRONG:
            permuted = _unordered(answer.items, gold.items, compare)
            if permuted is None or permuted.outcome is not Outcome.WRONG:
                return undecided("same parts in another order")
        return verdict
    if kinds == {Kind.BRACKETS, Kind.SET}:
        verdict = _unordered(answer.items, gold.items, compare)
        return verdict if verdict and verdict.outcome is Outcome.WRONG else undecided("a set beside a tuple")
    return undecided("parts of different kinds")


def _brackets(answer: Group, gold: Group, compare: Compare) -> Verdict | None:
    verdict = _ordered(answer.items, gold.items, compare)
    if verdict is None or verdict.outcome is not Outcome.RIGHT or answer.brackets == gold.brackets:
        return verdict
    return wrong("other brackets")


def _ordered(answer: tuple[str, ...], gold: tuple[str, ...], compare: Compare) -> Verdict | None:
    if len(answer) != len(gold):
        return _other_count(answer, gold)
    verdicts = [compare(a, g) for a, g in zip(answer, gold, strict=True)]
    if any(verdict is not None and verdict.outcome is Outcome.WRONG for verdict in verdicts):
        return wrong("another part")
    if all(verdict is not None and verdict.outcome is Outcome.RIGHT for verdict in verdicts):
        return right("same parts")
    return None if None in verdicts else undecided("a part cannot be compared")


def _unordered(answer: tuple[str, ...], gold: tuple[str, ...], compare: Compare) -> Verdict | None:
    """Sets: every part of each has an equal in the other."""
    unsure = False
    for left, right_side in ((answer, gold), (gold, answer)):
        for item in left:
            verdicts = [compare(item, other) if left is answer else compare(other, item) for other in right_side]
            if any(verdict is not None and verdict.outcome is Outcome.RIGHT for verdict in verdicts):
                continue
            if all(verdict is not None and verdict.outcome is Outcome.WRONG for verdict in verdicts):
                return wrong("another part") if len(answer) == len(gold) else _other_count(answer, gold)
            unsure = True
    return undecided("a part cannot be compared") if unsure else right("same parts")


def _other_count(answer: tuple[str, ...], gold: tuple[str, ...]) -> Verdict:
    """Words may be a sentence with commas rather than a list."""
    if all(_LETTER_OR_NUMBER.fullmatch(item) for item in (*answer, *gold)):
        return wrong("another number of parts")
    return undecided("another number of parts")

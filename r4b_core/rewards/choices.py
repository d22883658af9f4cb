"""Multiple choice: the options of a question, and which of them an answer names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from r4b_core.rewards.verdict import Outcome, Verdict, right, undecided, wrong

_MARKER = re.compile(
    r"(?:(?<=\s)|^)(?:\(([A-J])\)|\[([A-J])\]|([A-J])[.):])(?=\s|$|[^\sA-Za-z0-9])\s*|(?:^|\n)([A-J])\s+"
)
_PREFIX = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*(?=\(?[A-Z]\b)", re.IGNORECASE
)
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|\[([A-Z])\]|([A-Za-z]))[.):]?")
_LETTER_TEXT = re.compile(r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])(?:\s*[.):]|\s+[-=]\s))\s*(\S.*)", re.DOTALL)
_TEXT_LETTER = re.compile(r"(.*\S)\s+\(([A-Z])\)", re.DOTALL)
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:[\s,;/&]+(?:(?:and|or)\s+)?\(?[A-Z]\)?|\([A-Z]\))+")
_RUN = re.compile(r"[A-J]{2,6}")

Compare = Callable[[str, str], Verdict | None]


@dataclass(frozen=True)
class Choice:
    """What an answer says of the options: letters, and the text that stands beside a single one."""

    letters: tuple[str, ...] = ()
    text: str = ""


@lru_cache(256)
def read_options(question: str) -> dict[str, str]:
    """The options "A. ... B. ..." of a question by letter; empty where there are not two or more in a row.

    The last run of A, B, C, ... counts, so that a stem such as "points A. and B." does not.
    """
    marks = [(match, next(filter(None, match.groups()))) for match in _MARKER.finditer(question)]
    for first in reversed([index for index, (_, letter) in enumerate(marks) if letter == "A"]):
        run = [marks[first][0]]
        for match, letter in marks[first + 1 :]:
            if letter == chr(ord("A") + len(run)):
                run.append(match)
        if len(run) > 1:
            ends = [match.start() for match in run[1:]] + [len(question)]
            texts = [question[match.end() : end].strip() for match, end in zip(run, ends, strict=True)]
            texts[-1] = texts[-1].split("\n")[0]
            return {chr(ord("A") + k): text.strip(" ,;\n") for k, text in enumerate(texts)}
    return {}


@lru_cache(4096)
def read_choice(text: str) -> Choice:
    """The letters that a text in the notation of `text.clean` names; none where it is something else."""
    text = _PREFIX.sub("", text, count=1) if text[:1] in "tTcCoOaA" else text
    if match := _LETTER.fullmatch(text):
        return Choice((match[1] or match[2] or match[3],))
    if _SEVERAL.fullmatch(text):
        return Choice(tuple(dict.fromkeys(re.findall(r"\b[A-Z]\b", text))))
    if match := _LETTER_TEXT.fullmatch(text):
        return Choice((match[1] or match[2] or match[3],), match[4])
    if match := _TEXT_LETTER.fullmatch(text):
        return Choice((match[2],), match[1])
    return Choice()


def compare_choices(answer: str, gold: str, options: dict[str, str], compare: Compare) -> Verdict | None:
    """The verdict where one of both names a choice; None where neither does.

    Args:
        compare: compares two texts that are no choices.
    """
    said, meant = read_choice(answer), read_choice(gold)
    if options:
        said, meant = _of_options(answer, said, options), _of_options(gold, meant, options)
    if not meant.letters or not _is_choice(meant):
        return _text_reference(said, gold, options, compare) if said.letters else None
    if said.letters and (said.letters[0].isupper() or len(gold) == 1 or options):
        return _letters(said, meant, options, compare)
    if meant.text:
        return compare(answer, meant.text)
    if not options:
        return None if len(gold) == 1 and len(answer) > 1 and "=" in answer else undecided("a choice, but no options")
    named = [letter for letter, text in options.items() if _same(compare(answer, text))]
    if not named:
        return undecided("names none of the options")
    if len(meant.letters) > 1:
        return wrong("another choice")
    if meant.letters[0] in named:
        return right("text of the choice") if len(named) == 1 else undecided("several options read the same")
    return wrong("text of another choice")


def _of_options(text: str, choice: Choice, options: dict[str, str]) -> Choice:
    """With options, small letters and runs such as "ACD" are choices too."""
    if len(choice.letters) == 1 and not choice.text and choice.letters[0].upper() in options:
        return Choice((choice.letters[0].upper(),))
    if _RUN.fullmatch(text) and set(text) <= set(options) and len(set(text)) == len(text):
        return Choice(tuple(text))
    return choice


def _is_choice(meant: Choice) -> bool:
    """A small letter alone is a variable, and far in the alphabet a letter before text is no choice."""
    return all(letter.isupper() for letter in meant.letters) and (not meant.text or meant.letters[0] <= "J")


def _letters(said: Choice, meant: Choice, options: dict[str, str], compare: Compare) -> Verdict:
    ours, theirs = {x.upper() for x in said.letters}, {x.upper() for x in meant.letters}
    if ours != theirs:
        if len(ours) > len(theirs):
            return wrong("several choices")
        right_text = meant.text or options.get(meant.letters[0], "")
        if said.text and right_text and _same(compare(said.text, right_text)):
            return undecided("letter and text name different choices")
        return wrong("another choice")
    if said.text and len(ours) == 1:
        letter = said.letters[0].upper()
        own = options.get(letter) or meant.text
        others = [text for other, text in options.items() if other != letter]
        if own and not _same(compare(said.text, own)):
            if any(_same(compare(said.text, text)) for text in others):
                return undecided("letter and text name different choices")
            if (verdict := compare(said.text, own)) and verdict.outcome is Outcome.WRONG:
                return undecided("the text beside the letter is another")
    return right("same choice")


def _text_reference(said: Choice, gold: str, options: dict[str, str], compare: Compare) -> Verdict | None:
    """The reference is text, the answer names a letter."""
    if len(said.letters) > 1:
        return None
    letter = said.letters[0]
    if letter.upper() in options and (letter.isupper() or len(said.text) == 0):
        verdict = compare(options[letter.upper()], gold)
        if verdict is None or verdict.outcome is Outcome.UNDECIDED:
            others = [text for other, text in options.items() if other != letter.upper()]
            if not said.text and any(_same(compare(text, gold)) for text in others):
                return wrong("another choice")
            return undecided("the option chosen cannot be compared")
        if said.text and _same(verdict) != _same(compare(said.text, gold)):
            return undecided("letter and text name different choices")
        return right("letter of the choice") if _same(verdict) else wrong("another choice")
    if said.text and letter.isupper():
        return compare(said.text, gold)
    if letter.isupper() and len(gold) > 1:
        return undecided("a letter, but no options")
    return None


def _same(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.outcome is Outcome.RIGHT

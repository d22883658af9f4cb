"""Cleaning of questions and answers by rules (MMFineReason appendix, Table 11), each a pure function of a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from r4b_core.curate.standardize.settings import TEXT_RULES, TextRule
from r4b_core.modes import IMAGE
from r4b_core.rewards.answer import last_boxed

# C0 and C1 controls but tab and newline, zero-width characters, direction marks, the byte order mark.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_NEWLINE = re.compile("\r\n?|[\u2028\u2029\x85]")

_MARKDOWN_LINK = re.compile(r"!?\[([^\[\]\n]{0,200})\]\(\s*(?:https?://|www\.)[^\s()]*\s*\)")
_LINK = re.compile(
    r"(?:[(\[<]\s?)?(?:(?:source|see|link|from|via|url)\s?:\s?)?(?:https?://|ftp://|www\.)[^\s<>()\[\]]+(?:\s?[)\]>])?",
    re.I,
)

_WATERMARK = re.compile(
    r"""^[ \t]*(?:
        (?:downloaded|retrieved|scanned|printed)\ (?:from|by|with)\b.{0,120}
      | (?:©|\(c\)\ |copyright\b).{0,120}
      | all\ rights\ reserved\b.{0,40}
      | page\ \d{1,4}(?:\ of\ \d{1,4})?
      | (?:created|made|drawn)\ with\ (?:geogebra|desmos)\b.{0,40}
      | (?:not\ (?:drawn\ )?to\ scale\ )?©.{0,80}
      | .{0,20}(?:扫描全能王|菁优网|学科网|版权所有).{0,40}
    )[ \t.]*$""",
    re.I | re.M | re.X,
)

_NUMBER_WORD = re.compile(
    r"(?:question|problem|exercise|example|task|item|q|ex|no)\s*\.?\s*#?\d{1,4}[a-z]?\s*[.:)\]-]\s*", re.I
)
_NUMBER = re.compile(r"(?:\d{1,3}\s?[.)]\s+|\d{1,3}、\s*|[(（]\d{1,3}[)）]\s*|#\d{1,4}[.:)]?\s+)(?=\S)")
_LATER_NUMBER = re.compile(r"(?:^|\s)(?:\d{1,3}[.)]\s|\d{1,3}、|[(（]\d{1,3}[)）])")

_SCORE = re.compile(
    r"""[(\[（【]\s{0,3}
        (?:(?:this|the)\ (?:question|problem|item|part)\ (?:is\ worth|carries)\ |worth\ |total\ (?:of\ )?
         |本小?题(?:满分)?\s?)?
        \d{1,3}(?:\.\d)?\s?-?\s?(?:points?|marks?|pts?\.?|credits?|分)(?:\ each)?
        \s{0,3}[)\]）】]""",
    re.I | re.X,
)

_SPACES = re.compile(r"[ \t\u00a0\u3000]+")
_LINE_EDGE = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")

_WEAK = re.compile(
    r"""(?:please\ )?(?:
        (?:as|see|refer\ to|look\ at|given|consider)?\s*(?:shown|given)?\s*(?:in|at|to|on)?\s*
        (?:the|this|a)?\s*(?:following|above|below|attached|given)?\s*
        (?:images?|pictures?|figures?|fig|photos?|diagrams?|charts?|graphs?|screenshots?|questions?|problems?|tasks?)
        (?:\s*(?:shown|given|above|below|attached|here))?
      | answer|solve|calculate|compute|choose|select|question|none|null|nan|n/?a|untitled|test
    )""",
    re.I | re.X,
)
_NO_ANSWER = re.compile(
    r"""(?:n/?a|nan|null|none|unknown|no\ answer|not\ (?:given|available|provided|applicable)|omitted|proof|
        (?:see|refer\ to)\ (?:the\ )?(?:above|below|solution|explanation|image|figure|attached)|
        answers?\ (?:will|may|can)\ vary|open[- ]ended|略|证明略?|见解析|[-?.…_]+)\.?""",
    re.I | re.X,
)
_FINAL = re.compile(
    r"(?:final\s+)?answer\s*(?:is|:|=)\s*(?:\*\*)?\s*([^\n]{1,200}?)\s*(?:\*\*)?\s*\.?\s*$", re.I | re.M
)
_SHORT_ANSWER = 80
_CLOSING = 2000  # characters at the end of a solution in which it names its answer

_TOKEN = re.compile(r"\w+|[^\w\s.,;:!?'\"`’‘“”]")


def drop_control(text: str) -> str:
    """Composed characters, one kind of line end, nothing invisible."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _CONTROL.sub("", _NEWLINE.sub("\n", text))


def drop_links(text: str) -> str:
    """Addresses go; of a Markdown link its words stay."""
    if "://" not in text and "www." not in text.lower():
        return text
    return _LINK.sub(" ", _MARKDOWN_LINK.sub(r"\1", text))


def drop_watermarks(text: str) -> str:
    """Lines that a publisher, a scanner or a printer put there."""
    return _WATERMARK.sub("", text)


def drop_numbering(text: str) -> str:
    """The number of the question in its source. Where a later number shows that it counts parts, it stays."""
    marks, rest = _after_images(text)
    if match := _NUMBER_WORD.match(rest):
        return marks + rest[match.end() :]
    match = _NUMBER.match(rest)
    if match is None or _LATER_NUMBER.search(rest, match.end()):
        return text
    return marks + rest[match.end() :]


def drop_scores(text: str) -> str:
    """What the question counts in its exam: ``(5 points)``."""
    return _SCORE.sub(" ", text)


def tidy_whitespace(text: str) -> str:
    """Single spaces, at most one blank line, no edges."""
    return _BLANK_LINES.sub("\n\n", _LINE_EDGE.sub("\n", _SPACES.sub(" ", text))).strip()


RULES: dict[TextRule, Callable[[str], str]] = {
    "control": drop_control,
    "links": drop_links,
    "watermarks": drop_watermarks,
    "numbering": drop_numbering,
    "scores": drop_scores,
    "whitespace": tidy_whitespace,
}


def clean(text: str, rules: Sequence[TextRule] = TEXT_RULES) -> str:
    """The text after some rules, in their fixed order."""
    for name in TEXT_RULES:
        if name in rules:
            text = RULES[name](text)
    return text


def is_empty(question: str) -> bool:
    """Whether a question says nothing besides its pictures."""
    return not any(character.isalnum() for character in question.replace(IMAGE, ""))


def is_weak(question: str) -> bool:
    """Whether it only points at a picture, or names a task without saying which: ``See the figure.``"""
    words = question.replace(IMAGE, " ").strip(" \n\t.:;,!?-*\"'()")
    return len(words) < 80 and _WEAK.fullmatch(" ".join(words.split())) is not None


def foreign_share(text: str) -> float:
    """Share of letters that are neither Latin nor Greek (formulas are full of those)."""
    if text.isascii():
        return 0.0
    letters = [character for character in text if character.isalpha()]
    # Latin and Greek with their extensions and letterlike symbols lie below U+0400, in U+1E00-1FFF and U+2100-218F.
    foreign = sum(not (c < "\u0400" or "\u1e00" <= c < "\u2000" or "\u2100" <= c < "\u2190") for c in letters)
    return foreign / len(letters) if letters else 0.0


def find_answer(answer: str | None, solution: str | None, most: int) -> str | None:
    """A short answer that can be checked: the one given, else one that the source's solution names (paper Table 12).

    In the solution the last box comes first, then an answer tag, then a closing "answer is", then all of it where it is
    short and one line. Longer than ``most`` characters, or a word for there being none, is no answer.
    """
    for found in _candidates(answer, solution):
        found = tidy_whitespace(drop_control(found))
        if found and len(found) <= most and _NO_ANSWER.fullmatch(found) is None:
            return found
    return None


def words(text: str) -> list[str]:
    """What two texts are compared by: words, numbers and signs, without case, image marks and soft punctuation."""
    text = text.replace(IMAGE, " ")
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _TOKEN.findall(text.casefold())


def _candidates(answer: str | None, solution: str | None) -> list[str]:
    found = [answer] if answer else []
    if solution:
        if boxed := last_boxed(solution):
            found.append(boxed)
        before, tag, _ = solution.rpartition("</answer>")
        if tag and "<answer>" in before:
            found.append(before.rpartition("<answer>")[2])
        if named := _FINAL.findall(solution[-_CLOSING:]):
            found.append(named[-1])
        if len(solution) <= _SHORT_ANSWER and "\n" not in solution.strip() and "\\boxed" not in solution:
            found.append(solution)
    return found


def _after_images(text: str) -> tuple[str, str]:
    """(leading image marks and blanks, the rest)"""
    match = re.match(rf"(?:\s|{re.escape(IMAGE)})*", text)
    end = match.end() if match else 0
    return text[:end], text[end:]

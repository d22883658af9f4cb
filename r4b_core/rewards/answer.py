"""Finding the answer in a response: the tag first, then the box, then "the answer is", never inside the reasoning."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from r4b_core.modes import THINK_CLOSE, THINK_OPEN, TURN_END
from r4b_core.rewards.rules import compare
from r4b_core.rewards.verdict import Outcome

_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_BOXED = "\\boxed{"
_STATED = re.compile(r"\banswer\s*(?:is\b|:|=)[\s*:]*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_LAST_LETTER = re.compile(r"(?:^|[\s*:])\(?([A-J])\)?[.)*]*$")
_SHORT = 200


@dataclass(frozen=True)
class Extraction:
    """The answer of a response, or None with the reason why it has none."""

    answer: str | None
    reason: str = ""


def extract_answer(response: str) -> Extraction:
    """The answer in ``response``, the text after ``<think>``.

    It is what follows ``</think>``, up to the turn end; within it the last ``<answer>`` block, else the last
    ``\\boxed{}``, else what "the answer is", else all of it. A response that never closes its reasoning, or does so
    twice, has no answer.
    """
    _, close, after = response.partition(THINK_CLOSE)
    if not close:
        return Extraction(None, "no answer: the reasoning was never closed")
    text = after.partition(TURN_END)[0]
    if THINK_CLOSE in text or THINK_OPEN in text:
        return Extraction(None, "no answer: a second reasoning block")
    before, tag, _ = text.rpartition(_ANSWER_CLOSE)
    if tag and _ANSWER_OPEN in before:
        text = before.rpartition(_ANSWER_OPEN)[2]
    else:
        text = last_boxed(text) or _stated(text) or text
    text = (last_boxed(text) or text).strip()
    return Extraction(text) if text else Extraction(None, "no answer: nothing after the reasoning")


def find_answer(solution: str, options: Collection[str] = ()) -> Extraction:
    """The one answer of a worked solution, the text behind the reasoning; stricter than `extract_answer`.

    The ``<answer>`` blocks, else the outermost boxes, else what the last "the answer is" says, else the letter that
    the solution ends with (where there are ``options``), else the whole where it is one short line. Different
    answers in several blocks or boxes are no answer, nor is a box with something around another box.
    """
    solution = solution.partition(TURN_END)[0]
    found = _tagged(solution) or outer_boxes(solution)
    if found:
        texts = [_inside_boxes(text.strip()) for text in found]
        if any(text is None for text in texts):
            return Extraction(None, "a box inside the answer")
        last = texts[-1] or ""
        if any(text != last and _another(text or "", last) for text in texts[:-1]):
            return Extraction(None, "several different answers")
        return Extraction(last) if last else Extraction(None, "an empty answer")
    text = solution.strip()
    if stated := _stated(text):
        return Extraction(stated)
    line = text.rpartition("\n")[2].strip()
    if (letter := _LAST_LETTER.search(line[-_SHORT:])) and letter[1] in options:
        return Extraction(letter[1])
    if text and "\n" not in text and len(text) <= _SHORT:
        return Extraction(text)
    return Extraction(None, "no answer found")


def _tagged(text: str) -> list[str]:
    """Contents of the ``<answer>`` blocks."""
    pieces = text.split(_ANSWER_CLOSE)
    return [piece.rpartition(_ANSWER_OPEN)[2] for piece in pieces[:-1] if _ANSWER_OPEN in piece]


def _inside_boxes(text: str) -> str | None:
    """The text without boxes around the whole; None where a box lies inside something else.

    Words in front of a single box ("so \\boxed{5}") are let go.
    """
    while _BOXED in text:
        boxes = outer_boxes(text)
        if len(boxes) != 1 or _BOXED in text.replace(f"{_BOXED}{boxes[0]}}}", "", 1):
            return None
        around = text.replace(f"{_BOXED}{boxes[0]}}}", "", 1)
        if any(character.isdigit() for character in around):
            return None
        text = boxes[0].strip()
    return text


def _another(left: str, right: str) -> bool:
    verdict = compare(left, right)
    return verdict is None or verdict.outcome is not Outcome.RIGHT


def _stated(text: str) -> str | None:
    """What the last "the answer is" says, up to the end of its sentence or line."""
    stated = _STATED.findall(text)
    return _SENTENCE_END.split(stated[-1], maxsplit=1)[0].strip(" *") or None if stated else None


def outer_boxes(text: str) -> list[str]:
    """Contents of the ``\\boxed{...}`` that lie in no other box, in order. Linear in the text."""
    boxes: list[str] = []
    start = text.find(_BOXED)
    while start >= 0:
        depth, index = 1, start + len(_BOXED)
        while index < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            index += 1
        if depth:
            break
        boxes.append(text[start + len(_BOXED) : index - 1])
        start = text.find(_BOXED, index)
    return boxes


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance; of nested boxes the innermost. Linear in the text."""
    open_braces: list[int] = []
    found: tuple[int, int] | None = None
    for index, character in enumerate(text):
        if character == "{":
            open_braces.append(index)
        elif character == "}" and open_braces:
            begin = open_braces.pop() + 1
            if text.endswith(_BOXED, 0, begin) and (found is None or begin > found[0]):
                found = (begin, index)
    return text[found[0] : found[1]] if found else None

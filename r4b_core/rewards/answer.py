"""Finding the answer in a response."""

from __future__ import annotations

import re
from dataclasses import dataclass

from r4b_core.modes import THINK_CLOSE, THINK_OPEN, TURN_END

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOXED = "\\boxed{"


@dataclass(frozen=True)
class Extraction:
    """The answer of a response, or None with the reason why it has none."""

    answer: str | None
    reason: str = ""


def extract_answer(response: str) -> Extraction:
    """The answer in ``response``, the text after ``<think>``.

    It is what follows ``</think>``, up to the turn end; within it the last ``<answer>`` block, else the last
    ``\\boxed{}``, else all of it. A response that never closes its reasoning, or does so twice, has no answer.
    """
    _, close, after = response.partition(THINK_CLOSE)
    if not close:
        return Extraction(None, "no answer: the reasoning was never closed")
    text = after.partition(TURN_END)[0]
    if THINK_CLOSE in text or THINK_OPEN in text:
        return Extraction(None, "no answer: a second reasoning block")
    if blocks := _ANSWER_TAG.findall(text):
        text = blocks[-1]
    text = (last_boxed(text) or text).strip()
    return Extraction(text) if text else Extraction(None, "no answer: nothing after the reasoning")


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance; of nested boxes the innermost."""
    start = text.rfind(_BOXED)
    while start >= 0:
        depth, begin = 1, start + len(_BOXED)
        for index in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin:index]
        start = text.rfind(_BOXED, 0, start)
    return None

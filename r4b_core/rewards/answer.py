"""Finding the answer in a response."""

from __future__ import annotations

from dataclasses import dataclass

from r4b_core.modes import THINK_CLOSE, THINK_OPEN, TURN_END

_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
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
    before, tag, _ = text.rpartition(_ANSWER_CLOSE)
    if tag and _ANSWER_OPEN in before:
        text = before.rpartition(_ANSWER_OPEN)[2]
    text = (last_boxed(text) or text).strip()
    return Extraction(text) if text else Extraction(None, "no answer: nothing after the reasoning")


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

"""Has a distilled response the form that it was asked for? (MMFineReason 3.3; the limits are those of its code.)"""

from __future__ import annotations

import re

from pydantic import Field

from r4b_core.config.recipe import Settings
from r4b_core.data.records import Record
from r4b_core.modes import THINK_CLOSE, THINK_OPEN

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
_LETTERS = re.compile(r"[^a-z0-9]")


class TemplateSettings(Settings):
    """What a response and a caption must look like."""

    min_words: int = Field(200, ge=0, description="of the whole response, reasoning included")
    min_caption_words: int = Field(100, ge=0, description="of a caption, where there is one")
    max_characters: int = Field(400_000, ge=1000, description="of a response; 16,384 tokens are about a fifth of that")
    answer_tag_exempt: tuple[str, ...] = Field(
        ("VisualWebInstruct", "LLaVA-CoT", "AI2D"),
        description="sources, by how their name begins, whose responses may lack the answer tag",
    )
    error_markers: tuple[str, ...] = Field(
        ("[ERROR", "ERROR:", "Error code:", "<error>"), description="how a response or caption begins that is none"
    )


def split_response(response: str) -> tuple[str, str] | None:
    """(reasoning, solution) of a response with exactly one pair of think tags at its beginning; else None."""
    if response.count(THINK_OPEN) != 1 or response.count(THINK_CLOSE) != 1:
        return None
    before, _, rest = response.partition(THINK_OPEN)
    reasoning, close, solution = rest.partition(THINK_CLOSE)
    return (reasoning, solution) if close and not before.strip() else None


def template_fault(record: Record, settings: TemplateSettings) -> tuple[str, str] | None:
    """(constant reason, detail) of the first fault in a record's response or caption; None where there is none."""
    response = record.response
    if response is None or not response.strip():
        return "no response", ""
    if record.finish_reason not in (None, "stop"):
        return "response did not end", f"finish_reason is {record.finish_reason}"
    if len(response) > settings.max_characters:
        return "response too long", f"{len(response)} characters, more than {settings.max_characters}"
    if response.lstrip().startswith(settings.error_markers):
        return "error marker", response.strip()[:80]
    parts = split_response(response)
    if parts is None:
        return "think tags", "not one pair of think tags in order at the beginning"
    reasoning, solution = parts
    if not reasoning.strip():
        return "empty reasoning", ""
    if fault := _answer_tags(record, reasoning, solution, settings):
        return "answer tags", fault
    if (words := len(response.split())) < settings.min_words:
        return "response too short", f"{words} words, fewer than {settings.min_words}"
    return _caption_fault(record.caption, settings)


def _answer_tags(record: Record, reasoning: str, solution: str, settings: TemplateSettings) -> str | None:
    for name, text in (("reasoning", reasoning), ("solution", solution)):
        if not _paired(text):
            return f"unpaired in the {name}"
    if ANSWER_OPEN not in solution and not is_exempt(record.source, settings.answer_tag_exempt):
        return "none behind the reasoning"
    return None


def _paired(text: str) -> bool:
    """Is every tag closed before the next one opens?"""
    pieces = text.split(ANSWER_OPEN)
    return ANSWER_CLOSE not in pieces[0] and all(piece.count(ANSWER_CLOSE) == 1 for piece in pieces[1:])


def is_exempt(source: str, exempt: tuple[str, ...]) -> bool:
    """Does a source's name begin with one of these, capitals and punctuation aside?"""
    name = _LETTERS.sub("", source.casefold())
    return any(name.startswith(_LETTERS.sub("", each.casefold())) for each in exempt)


def _caption_fault(caption: str | None, settings: TemplateSettings) -> tuple[str, str] | None:
    if caption is None:
        return None
    if caption.lstrip().startswith(settings.error_markers):
        return "error marker", caption.strip()[:80]
    if (words := len(caption.split())) < settings.min_caption_words:
        return "caption too short", f"{words} words, fewer than {settings.min_caption_words}"
    return None

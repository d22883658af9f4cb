"""A language model as judge of what rules cannot decide: its prompt, fenced, and its verdict, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r4b_core.modes import IMAGE, THINK_CLOSE, THINK_OPEN
from r4b_core.rewards.verdict import Verdict, right, undecided, wrong

PROMPT = Path(__file__).parents[1] / "prompts" / "judge.txt"
_FIELD = re.compile(r"\{(fence|question|reference|answer)\}")
_MAX_CHARACTERS = 8000
_SPEAKS_TO_JUDGE = re.compile(r"judg(?:e?ment|e\b|ing)|equivalent|\bverdict\b|</?think>", re.IGNORECASE)
_VERDICTS = {"JUDGEMENT: EQUIVALENT": True, "JUDGEMENT: DIFFERENT": False}


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One comparison to be judged.

    Attributes:
        key: of the record.
        prompt: the whole user message.
    """

    key: str
    prompt: str


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """What the judge wrote, as the endpoint gave it; ``text`` is None where there was no reply."""

    text: str | None
    finish_reason: str | None


Judge = Callable[[list[JudgeRequest]], Sequence[JudgeReply]]
"""Asks for all of them and returns the replies in their order."""


def judge_prompt(question: str, reference: str, answer: str, template: str | None = None) -> str | None:
    """The message to the judge; None where the answer addresses the judge, or is too long to be shown.

    Each text is one JSON string between fences that occur in none of them, so no text can end its own fence or write
    a line of its own.

    Raises:
        ValueError: if the template lacks one of its four fields.
    """
    texts = {"question": question, "reference": reference, "answer": answer}
    if _SPEAKS_TO_JUDGE.search(answer) or max(map(len, texts.values())) > _MAX_CHARACTERS:
        return None
    template = PROMPT.read_text(encoding="utf-8") if template is None else template
    if missing := {"fence", *texts} - set(_FIELD.findall(template)):
        raise ValueError(f"the judge's prompt lacks {', '.join('{' + name + '}' for name in sorted(missing))}: add it")
    fields = {name: json.dumps(text.replace(IMAGE, "[image]"), ensure_ascii=False) for name, text in texts.items()}
    fence = "=" * 8
    while any(fence in text for text in (*fields.values(), template)):
        fence += "="
    fields["fence"] = fence
    return _FIELD.sub(lambda match: fields[match[1]], template)


def read_judgement(reply: JudgeReply) -> Verdict:
    """Right or wrong where the reply is whole and its last line, alone of all lines, gives one of the two verdicts."""
    if reply.text is None:
        return undecided("judge: no reply")
    if reply.finish_reason != "stop":
        return undecided("judge: the reply did not end")
    text = reply.text
    if THINK_OPEN in text or THINK_CLOSE in text:
        before, close, text = text.rpartition(THINK_CLOSE)
        if not close or THINK_OPEN in text:
            return undecided("judge: the reasoning did not end")
    lines = [line.strip() for line in text.strip().splitlines()]
    speaking = [line for line in lines if "JUDGEMENT" in line.upper() or "JUDGMENT" in line.upper()]
    if len(speaking) != 1 or lines[-1] not in _VERDICTS:
        return undecided("judge: no clear verdict")
    return right("judge: equivalent") if _VERDICTS[lines[-1]] else wrong("judge: different")

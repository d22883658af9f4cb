"""The three modes and the tags that carry them: the one module that spells a tag (R-4B sections 2.2 and 4.1).

Every prompt ends with ``<think>``. The *decision* is the first token after it: one newline starts a reasoning trace,
two newlines (then ``</think>``) start a direct answer. In training a mode is forced by appending its tokens; in auto
mode nothing is appended and the model decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
NEWLINE = "\n"
BLANK_LINE = "\n\n"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE = "<image>"


class Mode(StrEnum):
    THINKING = "thinking"
    DIRECT = "direct"
    AUTO = "auto"


FORCED_TEXT: dict[Mode, tuple[str, ...]] = {
    Mode.THINKING: (NEWLINE,),
    Mode.DIRECT: (BLANK_LINE, THINK_CLOSE),
    Mode.AUTO: (),
}


@dataclass(frozen=True)
class ModeTokens:
    """The token ids of the tags in one tokenizer (Qwen3: 151667, 151668, 198, 271, 151645)."""

    think_open: int
    think_close: int
    newline: int
    blank_line: int
    turn_end: int

    def forced(self, mode: Mode) -> tuple[int, ...]:
        """The tokens that force a mode, appended after ``<think>``; the first one is the decision."""
        ids = {NEWLINE: self.newline, BLANK_LINE: self.blank_line, THINK_CLOSE: self.think_close}
        return tuple(ids[text] for text in FORCED_TEXT[mode])

    def mode_of(self, response: Sequence[int]) -> Mode:
        """The mode that a response's decision token chose; AUTO where it is neither (malformed)."""
        if not response:
            return Mode.AUTO
        return {self.newline: Mode.THINKING, self.blank_line: Mode.DIRECT}.get(response[0], Mode.AUTO)

    def split(self, response: Sequence[int]) -> tuple[list[int], list[int]]:
        """(reasoning, answer) token lists of a response, without tags and turn end.

        A response whose ``</think>`` never came has no answer.
        """
        tokens = list(response)
        if self.think_close not in tokens:
            return tokens[1:], []
        close = tokens.index(self.think_close)
        answer = tokens[close + 1 :]
        if self.turn_end in answer:
            answer = answer[: answer.index(self.turn_end)]
        return tokens[1:close], answer

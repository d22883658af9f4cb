"""Tokenizers: the protocol that everything above relies on, and the word-level one of the board task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

from r4b_core.modes import (
    BLANK_LINE,
    IMAGE,
    NEWLINE,
    THINK_CLOSE,
    THINK_OPEN,
    TURN_END,
    TURN_START,
    ModeTokens,
)

PAD = "<pad>"
DIGITS = tuple("0123456789")
COLOURS = ("grey", "orange", "blue", "green")
ADD, MULTIPLY, SET = "+", "*", "="
MULTIPLIERS = (3, 7, 9)
MAX_TILES = 12


def position_word(index: int) -> str:
    """The word for tile ``index`` (0-based): ``#1`` is the first tile."""
    return f"#{index + 1}"


OPERATION_WORDS = (
    *(f"{ADD}{digit}" for digit in range(1, 10)),
    *(f"{MULTIPLY}{digit}" for digit in MULTIPLIERS),
    *(f"{SET}{digit}" for digit in range(10)),
)
QUESTION_WORDS = ("digit", "at", "count", "final", "value", "?")
TAGS = (PAD, TURN_START, TURN_END, THINK_OPEN, THINK_CLOSE, NEWLINE, BLANK_LINE, IMAGE)
VOCABULARY: tuple[str, ...] = (
    *TAGS,
    "user",
    "assistant",
    *DIGITS,
    *(position_word(index) for index in range(MAX_TILES)),
    *COLOURS,
    *OPERATION_WORDS,
    *QUESTION_WORDS,
)


@runtime_checkable
class Tokenizer(Protocol):
    """What encoding, rollout engines and rewards need from a tokenizer; tags encode to one token each."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that mean something."""
        ...

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the LM head."""
        ...

    @property
    def mode_tokens(self) -> ModeTokens: ...

    @property
    def image_token(self) -> int: ...

    @property
    def pad_token(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def __hash__(self) -> int: ...


class ToyTokenizer:
    """Word-level tokenizer of the board task: every word, digit and tag is one token.

    Text and ids map one to one: two neighbouring words are parted by one space, and so are two neighbouring newline
    tokens, which would read as another one without it; tags touch their neighbours.
    ``decode(encode(text)) == text`` for text written so, and ``encode(decode(ids)) == ids`` for all ids.
    """

    VOCAB_MULTIPLE = 64

    def __init__(self) -> None:
        self._words = VOCABULARY
        self._ids = {word: index for index, word in enumerate(VOCABULARY)}
        newlines, tags = (BLANK_LINE, NEWLINE), [tag for tag in TAGS if tag not in (NEWLINE, BLANK_LINE)]
        self._glue = {self._ids[tag]: -1 for tag in tags} | {self._ids[text]: -2 for text in newlines}
        pieces = "|".join(re.escape(piece) for piece in (*tags, *newlines))
        self._split = re.compile(rf"({pieces})|[^\S\n]+")

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 64, so that tensor parallelism splits it evenly."""
        return -(-len(self._words) // self.VOCAB_MULTIPLE) * self.VOCAB_MULTIPLE

    @cached_property
    def mode_tokens(self) -> ModeTokens:
        return ModeTokens(
            think_open=self._ids[THINK_OPEN],
            think_close=self._ids[THINK_CLOSE],
            newline=self._ids[NEWLINE],
            blank_line=self._ids[BLANK_LINE],
            turn_end=self._ids[TURN_END],
        )

    @property
    def image_token(self) -> int:
        return self._ids[IMAGE]

    @property
    def pad_token(self) -> int:
        return self._ids[PAD]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            ValueError: naming the first word that is not in the vocabulary.
        """
        words = [piece for piece in self._split.split(text) if piece]
        try:
            return [self._ids[word] for word in words]
        except KeyError as error:
            raise ValueError(
                f"the word {error.args[0]!r} is not among the {self.vocab_size} words of the board task: "
                "write the question with those words, or use a model with a full tokenizer"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``.

        Raises:
            ValueError: for an id outside the vocabulary (such as a padding row of the LM head).
        """
        parts: list[str] = []
        last = -1
        for index in ids:
            if not 0 <= index < len(self._words):
                raise ValueError(f"token {index} is outside the vocabulary of {len(self._words)} words")
            kind = self._glue.get(index, 0)
            if parts and kind == last and kind != -1:
                parts.append(" ")
            parts.append(self._words[index])
            last = kind
        return "".join(parts)

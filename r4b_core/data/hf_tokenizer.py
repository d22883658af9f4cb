"""A Hugging Face ``tokenizer.json`` as the trainer takes it; nothing in its folder is executed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from r4b_core.modes import (
    BLANK_LINE,
    NEWLINE,
    THINK_CLOSE,
    THINK_OPEN,
    TURN_END,
    TURN_START,
    ModeTokens,
)

_PAD = "<|endoftext|>"


class HuggingFaceTokenizer:
    """Qwen's byte-level BPE, or another in which every tag, one newline and two newlines are one token each."""

    def __init__(self, folder: str | Path, image: str) -> None:
        """Read ``folder/tokenizer.json``; ``image`` is the placeholder that stands for image tokens.

        Raises:
            ValueError: if the file is missing or damaged, or a tag is not one token.
        """
        self.path = Path(folder) / "tokenizer.json"
        try:
            self._tokenizer = FastTokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"model.processor: {self.path} is not a readable tokenizer ({error})") from error
        tags = (THINK_OPEN, THINK_CLOSE, NEWLINE, BLANK_LINE, TURN_START, TURN_END, image)
        found = {tag: self.encode(tag) for tag in tags}
        if split := [tag for tag, ids in found.items() if len(ids) != 1]:
            raise ValueError(
                f"model.processor: {self.path} splits {', '.join(map(repr, split))} into several tokens or knows them "
                "not; each must be one: add them to the tokenizer, as Qwen3's and R-4B's have them"
            )
        self._ids = {tag: ids[0] for tag, ids in found.items()}
        self.image = image

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def padded_vocab_size(self) -> int:
        """The model's table may have more rows; no fewer than the tokenizer has tokens."""
        return self.vocab_size

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
        return self._ids[self.image]

    @property
    def pad_token(self) -> int:
        pad = self._tokenizer.token_to_id(_PAD)
        return pad if pad is not None else self.mode_tokens.turn_end

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

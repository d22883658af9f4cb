from __future__ import annotations

import random

import pytest

from r4b_core.data.tokenizer import VOCABULARY, Tokenizer, ToyTokenizer
from r4b_core.modes import BLANK_LINE, NEWLINE, THINK_CLOSE, Mode

TOKENIZER = ToyTokenizer()


def test_vocabulary_is_small_and_unique() -> None:
    assert TOKENIZER.vocab_size == len(set(VOCABULARY)) < 100
    assert TOKENIZER.padded_vocab_size % 64 == 0
    assert 0 <= TOKENIZER.padded_vocab_size - TOKENIZER.vocab_size < 64
    assert isinstance(TOKENIZER, Tokenizer)


def test_every_word_is_one_token() -> None:
    for index, word in enumerate(VOCABULARY):
        assert TOKENIZER.encode(word) == [index]
        assert TOKENIZER.decode([index]) == word


def test_any_token_sequence_survives_the_round_trip() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        ids = [draw.randrange(TOKENIZER.vocab_size) for _ in range(draw.randrange(12))]
        text = TOKENIZER.decode(ids)
        assert TOKENIZER.encode(text) == ids
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_neighbouring_newlines_stay_apart() -> None:
    newline, blank = TOKENIZER.mode_tokens.newline, TOKENIZER.mode_tokens.blank_line
    assert TOKENIZER.encode(BLANK_LINE) == [blank]
    assert TOKENIZER.encode(TOKENIZER.decode([newline, newline])) == [newline, newline]


def test_forced_modes_decode_to_the_tags() -> None:
    modes = TOKENIZER.mode_tokens
    assert TOKENIZER.decode(modes.forced(Mode.THINKING)) == NEWLINE
    assert TOKENIZER.decode(modes.forced(Mode.DIRECT)) == BLANK_LINE + THINK_CLOSE


@pytest.mark.parametrize("text", ["what is 7 ?", "12", "digit at #13 ?", "Digit"])
def test_unknown_word_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="word '(what|12|#13|Digit)' is not among"):
        TOKENIZER.encode(text)


def test_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="token 64 is outside"):
        TOKENIZER.decode([TOKENIZER.vocab_size])

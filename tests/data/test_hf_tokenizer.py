"""A Hugging Face tokenizer as the trainer takes it, and why a response's decision is encoded by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from r4b_core.data.encoding import encode_response
from r4b_core.data.hf_tokenizer import HuggingFaceTokenizer
from r4b_core.data.records import training_response
from r4b_core.data.schema import Sample
from r4b_core.modes import Mode
from tests.models.processing_oracle import ByteTokenizer
from tests.stages.record_files import write_processor


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(write_processor(tmp_path_factory.mktemp("tok"), "qwen3_vl"), "<|image_pad|>")


def sample(response: str, mode: Mode | None = None) -> Sample:
    return Sample("1", "s", [], "?", "", response=response, mode=mode)


def test_reasoning_that_begins_with_a_newline_stays_reasoning(tokenizer: HuggingFaceTokenizer) -> None:
    text = "\n\nFirst, look.\n</think>\n\n4"
    tags = tokenizer.mode_tokens
    assert tokenizer.encode(text)[0] == tags.blank_line  # encoded as a whole, it would answer at once
    tokens = encode_response(tokenizer, sample(text, Mode.THINKING))
    assert tokens[:2] == [tags.newline, tags.newline] and tags.mode_of(tokens) is Mode.THINKING
    assert tokenizer.decode(tokens) == text + "<|im_end|>"


@pytest.mark.parametrize("mode", [Mode.THINKING, Mode.DIRECT])
@pytest.mark.parametrize("body", ["4", "\n4", "\n\n4", " 4"])
def test_every_response_begins_with_its_modes_tokens_and_ends_the_turn(
    tokenizer: HuggingFaceTokenizer, mode: Mode, body: str
) -> None:
    text, found = training_response(f"<think>{body}</think>{body}", mode)
    tokens = encode_response(tokenizer, sample(text, found))
    tags = tokenizer.mode_tokens
    forced = tags.forced(mode)
    assert tuple(tokens[: len(forced)]) == forced and tags.mode_of(tokens) is mode
    assert tokens.count(tags.turn_end) == 1 and tokens[-1] == tags.turn_end
    assert tokens.count(tags.think_close) == 1
    assert tokenizer.decode(tokens) == text
    assert encode_response(tokenizer, sample(text)) == tokens  # the mode can be read off


@pytest.mark.parametrize("mode,response", [(None, "4"), (Mode.THINKING, "4"), (Mode.DIRECT, "\n4</think>")])
def test_a_response_that_begins_as_neither_mode_is_refused(
    tokenizer: HuggingFaceTokenizer, mode: Mode | None, response: str
) -> None:
    with pytest.raises(ValueError, match="the response of sample '1' begins with .*, not as (its|either) mode"):
        encode_response(tokenizer, sample(response, mode))


def test_a_tokenizer_without_a_token_for_a_blank_line_is_refused(tmp_path: Path) -> None:
    ByteTokenizer("<image>").pretrained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"splits '\\n\\n' into several tokens"):
        HuggingFaceTokenizer(tmp_path, "<image>")
    with pytest.raises(ValueError, match="is not a readable tokenizer"):
        HuggingFaceTokenizer(tmp_path / "absent", "<image>")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from r4b_core.data.boards import make_samples, write_response
from r4b_core.data.encoding import encode_prompt, encode_response, encode_samples
from r4b_core.data.processing import PromptError
from r4b_core.data.quarantine import Quarantine
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.modes import IMAGE, Mode

TOKENIZER = ToyTokenizer()


def image(rows: int, columns: int, value: int = 0) -> np.ndarray:
    return np.full((16 * rows, 16 * columns, 3), value, np.uint8)


def test_prompt_ends_with_think_and_holds_the_image() -> None:
    prompt = encode_prompt(TOKENIZER, Sample("a", "read", [image(2, 3)], "digit at #1 ?", "1"))
    text = TOKENIZER.decode(prompt.tokens.tolist())
    assert text == f"<|im_start|>user\n{IMAGE * 8}digit at #1 ?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert prompt.vision_index.tolist() == [-1] * 3 + [0, 1, 2, -2, 3, 4, 5, -2] + [-1] * 10
    assert prompt.patches.shape == (6, 768)
    assert prompt.image_grid.tolist() == [[1, 2, 3]]
    assert prompt.position_ids.tolist() == [list(range(21))] * 3 and prompt.next_position == 21


def test_several_images_keep_their_places() -> None:
    sample = Sample("a", "read", [image(1, 1), image(1, 2, 255)], "final <image> value <image> ?", "1")
    prompt = encode_prompt(TOKENIZER, sample)
    assert prompt.vision_index.tolist() == [-1] * 4 + [0, -2, -1, 1, 2, -2] + [-1] * 7
    assert prompt.patches[:, 0].tolist() == [-1.0, 1.0, 1.0]
    assert prompt.image_grid.tolist() == [[1, 1, 1], [1, 1, 2]]


def test_text_alone() -> None:
    prompt = encode_prompt(TOKENIZER, Sample("a", "text", [], "final value ?", "1"))
    assert (prompt.vision_index == -1).all()
    assert prompt.patches.shape == (0, 768) and prompt.image_grid.shape == (0, 3)


def test_response_round_trip() -> None:
    (sample,) = make_samples("train", 0, "s", 0, 1, {"value": 1.0})
    with pytest.raises(ValueError, match="has no response: annotate it"):
        encode_response(TOKENIZER, sample)
    sample.response = write_response(sample, Mode.THINKING)
    assert TOKENIZER.decode(encode_response(TOKENIZER, sample)) == sample.response


def test_placeholder_mismatch() -> None:
    with pytest.raises(PromptError, match="1 times '<image>' and the sample has 2 images"):
        encode_prompt(TOKENIZER, Sample("a", "read", [image(1, 1)] * 2, "final <image> value ?", "1"))


def test_encoding_does_not_depend_on_what_was_encoded_before() -> None:
    sample = Sample("a", "read", [image(2, 3)], "digit at #1 ?", "1")
    first = encode_prompt(TOKENIZER, sample)
    encode_prompt(TOKENIZER, Sample("b", "read", [image(3, 3)], "digit at #1 ?", "1"))
    again = encode_prompt(TOKENIZER, sample)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.vision_index, again.vision_index)


def test_unusable_samples_go_to_quarantine(tmp_path: Path) -> None:
    good = Sample("good", "read", [image(1, 4)], "digit at #1 ?", "1")
    samples = [
        good,
        Sample("odd", "read", [np.zeros((15, 16, 3), np.uint8)], "digit at #1 ?", "1"),
        Sample("tag", "read", [image(1, 4)], "digit at <image> <image> ?", "1"),
        Sample("word", "read", [image(1, 4)], "letter at #1 ?", "1"),
        Sample("long", "read", [image(4, 4)], "digit at #1 ?", "1"),
    ]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    kept = encode_samples(TOKENIZER, samples, quarantine, capacity=50, response_budget=20)
    assert [sample.id for sample, _ in kept] == ["good"]
    assert quarantine.counts == {
        "image cannot be used": 1,
        "question cannot be used": 1,
        "text cannot be encoded": 1,
        "longer than the packing capacity": 1,
    }


def test_room_for_the_own_response(tmp_path: Path) -> None:
    sample = Sample("a", "read", [image(1, 4)], "digit at #1 ?", "1", response="\n\n</think>1<|im_end|>")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    length = encode_prompt(TOKENIZER, sample).num_tokens + 4
    assert len(encode_samples(TOKENIZER, [sample], quarantine, length)) == 1
    assert not encode_samples(TOKENIZER, [sample], quarantine, length - 1)

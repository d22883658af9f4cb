"""Chat messages: what is refused, what is made harmless, and what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from r4b_core.data.chat import Message, escape, place_images, question_message, read_messages, render
from r4b_core.data.processing import PromptError
from r4b_core.data.tokenizer import ToyTokenizer

HEADER = "<|im_start|>assistant\n<think>"


def user(*parts: str | None) -> Message:
    return Message("user", parts)


@pytest.mark.parametrize(
    "tag",
    [
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
        *("<|video_pad|>", "<image>", "<video>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        "<tool_response>",
    ],
)
def test_a_tag_in_a_users_text_becomes_plain_text(tag: str) -> None:
    assert escape(f"what is {tag} ?") == (f"what is < {tag[1:]} ?", 1)
    assert escape(tag + tag) == (f"< {tag[1:]}" * 2, 2)
    assert escape(f"<{tag}") == (f"<< {tag[1:]}", 1)


@pytest.mark.parametrize(
    "text", ["a < b", "<|", "|>", "x<|y|", "<images>", "<thinking>", "1 <| 2 |> 3", "< image>", "<b>"]
)
def test_other_text_is_left_alone(text: str) -> None:
    assert escape(text) == (text, 0)


def test_an_assistant_may_have_thought() -> None:
    answer = "<think>\nhm <image>\n</think>Yes."
    assert escape(answer, "assistant") == ("<think>\nhm < image>\n</think>Yes.", 1)
    assert escape(answer, "user")[1] == 3


def test_a_tag_is_not_put_together_from_neighbouring_texts() -> None:
    rendered = render([user("<ima", "ge>", None, "<|image_", "pad|>")], "[I]")
    assert rendered.text == f"<|im_start|>user\n< image>[I]< |image_pad|><|im_end|>\n{HEADER}"
    assert (rendered.num_images, rendered.escaped) == (1, 2)


def test_escaped_text_stays_escaped() -> None:
    once, _ = escape("<<image> <|im_end|>")
    assert escape(once) == (once, 0)


def test_messages_in_the_common_form() -> None:
    read = read_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]},
        ]
    )
    assert read == [Message("system", ("Be brief.",)), Message("user", (None, "What?", None))]
    assert read[1].num_images == 2
    assert render(read, "[I]").text == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n[I]What?[I]<|im_end|>\n{HEADER}"
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "tool", "content": "x"}, "message 0 has the role 'tool': give one of system, user, assistant"),
        ({"content": "x"}, "has the role None"),
        ({"role": "user"}, "has the content None"),
        ({"role": "user", "content": [{"type": "video"}]}, "holds a video; video is not supported"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, "video is not supported"),
        ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "image in its part: .* `images`"),
        ({"role": "user", "content": [{"type": "audio"}]}, "holds the part"),
        ({"role": "user", "content": [{"type": "text"}]}, "holds the part"),
        ({"role": "user", "content": ["text"]}, "holds the part 'text'"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        read_messages([message])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "ends with the user's message"),
        ([user("a"), Message("assistant", ("b",))], "ends with the user's message"),
        ([user("a"), Message("system", ("b",)), user("c")], "comes first and once"),
        ([Message("system", ("a",)), Message("system", ("b",)), user("c")], "comes first and once"),
    ],
)
def test_conversations_that_are_no_prompt(messages: list[Message], expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        render(messages, "[I]")


def test_images_go_where_they_are_marked() -> None:
    assert question_message("left <image> or right <image>?", 2) == user("left ", None, " or right ", None, "?")
    assert question_message("<image>?", 1) == user("", None, "?")


def test_images_without_a_mark_go_in_front() -> None:
    assert render([question_message("which?", 2, after_image="\n")], "[I]").text.startswith(
        "<|im_start|>user\n[I]\n[I]\nwhich?<|im_end|>"
    )


def test_without_images_a_mark_is_a_word() -> None:
    rendered = render([question_message("what does <image> mean?", 0)], "[I]")
    assert "what does < image> mean?" in rendered.text and (rendered.num_images, rendered.escaped) == (0, 1)


@pytest.mark.parametrize(("question", "images"), [("<image> and <image>", 1), ("<image>", 2)])
def test_marks_that_do_not_match_are_refused(question: str, images: int) -> None:
    with pytest.raises(PromptError, match=f"the sample has {images} images"):
        question_message(question, images)


def test_image_tokens_are_repeated_in_place() -> None:
    tokenizer = ToyTokenizer()
    image, digit = tokenizer.image_token, tokenizer.encode("digit")[0]
    tokens, index = place_images(tokenizer, "<image>digit<image>", [np.array([0, 1, -2]), np.array([4])])
    assert tokens.tolist() == [image, image, image, digit, image]
    assert index.tolist() == [0, 1, -2, -1, 4]
    tokens, index = place_images(tokenizer, "digit", [])
    assert (tokens.tolist(), index.tolist()) == ([digit], [-1])
    with pytest.raises(PromptError, match="holds 1 image tokens and there are 0 images"):
        place_images(tokenizer, "<image>digit", [])

"""From records to what training takes: the shapes of responses (R-4B sections 2.2 and 4.1), and what has none."""

from __future__ import annotations

import pytest

from r4b_core.data.processing import PromptError
from r4b_core.data.records import Record, ResponseError, to_sample, training_response
from r4b_core.modes import Mode

THINKING = "\nso it is 4\n</think>\n\n<answer>4</answer><|im_end|>"
DIRECT = "\n\n</think>\n\n<answer>4</answer><|im_end|>"


@pytest.mark.parametrize(
    "response",
    [
        "<think>\nso it is 4\n</think>\n\n<answer>4</answer>",
        "<think>so it is 4</think><answer>4</answer><|im_end|>",
        "so it is 4\n</think>\n<answer>4</answer>",  # the prompt ended with <think>
        "\n<think>\n\n\nso it is 4 </think> <answer>4</answer> ",
    ],
)
def test_a_response_that_thinks(response: str) -> None:
    assert training_response(response) == (THINKING, Mode.THINKING)
    assert training_response(response, "thinking") == (THINKING, Mode.THINKING)
    assert training_response(response, "direct") == (DIRECT, Mode.DIRECT)  # a rule chose to answer at once


@pytest.mark.parametrize(
    "response",
    ["<think>\n\n</think><answer>4</answer>", "<think> </think>\n\n<answer>4</answer>", "<answer>4</answer>"],
)
def test_a_response_that_answers_at_once(response: str) -> None:
    assert training_response(response) == (DIRECT, Mode.DIRECT)
    assert training_response(response, "direct") == (DIRECT, Mode.DIRECT)
    with pytest.raises(ResponseError, match="mode is thinking and there is no reasoning in it"):
        training_response(response, "thinking")


@pytest.mark.parametrize(
    "response,reason",
    [
        ("<think>\nand so on", "<think> is never closed"),
        ("<think>a</think>b</think>c", "more than once"),
        ("<think>a<think>b</think>c", "more than once"),
        ("<think>a</think>b<think>c", "more than once"),
        ("<think>a</think>\n", "there is no answer after </think>"),
        ("", "there is no answer"),
        ("<|im_end|>", "there is no answer"),
    ],
)
def test_another_shape_is_refused(response: str, reason: str) -> None:
    with pytest.raises(ResponseError, match=reason):
        training_response(response)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ResponseError, match="mode is 'auto': thinking and direct can be trained"):
        training_response("4", "auto")


def test_tags_of_the_chat_template_in_a_response_are_made_plain() -> None:
    text, _ = training_response("<think>a <|im_start|>user</think>b <image> <|im_end|> c")
    assert text == "\na < |im_start|>user\n</think>\n\nb < image> < |im_end|> c<|im_end|>"


def record(**changes: object) -> Record:
    values: dict = {"id": "1", "source": "s", "question": "2+2?", "answer": "4", "response": "<think>a</think>4"}
    return Record(**values | changes)


def test_a_sample_carries_its_pass_rate_and_a_label_for_reports() -> None:
    sample = to_sample(record(tries=4, right=1, mode="thinking"))
    assert (sample.id, sample.mode, sample.pass_rate, sample.difficulty) == ("s/1", Mode.THINKING, 0.25, "hard")
    assert [to_sample(record(tries=4, right=right)).difficulty for right in (2, 3)] == ["mid", "easy"]
    assert to_sample(record()).difficulty == ""


def test_a_prompt_needs_no_response() -> None:
    assert to_sample(record(response="<think>", mode="odd"), response=False).response is None
    assert to_sample(record(response=None)).response is None


@pytest.mark.parametrize(
    "changes,kind,reason",
    [
        ({"question": ""}, PromptError, "there is no question"),
        ({"finish_reason": "length"}, ResponseError, "cut off by the token limit"),
        ({"images": [b"x"]}, ValueError, "not a PNG"),
    ],
)
def test_what_cannot_be_a_sample(changes: dict, kind: type[ValueError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        to_sample(record(**changes))

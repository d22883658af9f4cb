from __future__ import annotations

import time

import pytest

from r4b_core.rewards.answer import extract_answer, last_boxed


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\n\n</think>7<|im_end|>", "7"),
        ("\n#1 4 #2 +3 7</think>7", "7"),
        ("\nso 3</think>\n\n 10 \n<|im_end|>\n 4", "10"),
        ("\nx</think>It is <answer> 12 </answer>.<|im_end|>", "12"),
        ("\nx</think><answer>1</answer> no: <answer>2</answer>", "2"),
        ("\n<answer>9</answer></think>3", "3"),
        ("\nx</think>Thus \\boxed{\\frac{1}{2}} holds.", "\\frac{1}{2}"),
        ("\nx</think><answer>so \\boxed{5}</answer> or \\boxed{6}", "5"),
        ("\n\\boxed{1}</think>2", "2"),
        ("\nx</think><answer>open", "<answer>open"),
    ],
)
def test_answer_is_found(response: str, answer: str) -> None:
    assert extract_answer(response).answer == answer


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "never closed"),
        ("\n#1 4 #2 +3", "never closed"),
        ("\n<answer>7</answer>", "never closed"),
        ("\nx</think>", "nothing after"),
        ("\nx</think> <|im_end|>7", "nothing after"),
        ("\nx</think><answer> </answer>", "nothing after"),
        ("\nx</think>1</think>2", "second reasoning block"),
        ("\nx</think><think>7", "second reasoning block"),
    ],
)
def test_no_answer(response: str, reason: str) -> None:
    found = extract_answer(response)
    assert found.answer is None
    assert found.reason.startswith("no answer") and reason in found.reason


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("}}\\boxed{3}", "3"),
        ("boxed{3}", None),
        ("\\boxed{", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize("piece", ["\\boxed{", "<answer>", "{", "</answer>"])
def test_long_hostile_responses_take_linear_time(piece: str) -> None:
    started = time.process_time()
    extract_answer("\n</think>" + piece * 40_000)
    assert time.process_time() - started < 2

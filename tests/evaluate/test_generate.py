"""Asking a model: the same decision and tokens as transformers from the same files, and what is refused beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from r4b_core.data.hf_tokenizer import HuggingFaceTokenizer
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.evaluate import generate, load
from r4b_core.evaluate.generate import Answer, Decision, Loading, Piece, Question, Writer, ask
from r4b_core.models.convert import to_megatron
from r4b_core.modes import Mode
from tests.evaluate.checkpoints import IMAGE_TAG, MAX_PIXELS, MIN_PIXELS, tokenizer, write_checkpoint, write_photograph
from tests.models.convert_cases import write_theirs
from tests.models.processing_oracle import qwen_image_processor, qwen_processor

SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3_vl")
    write_checkpoint(made, "qwen3_vl")
    write_photograph(made, "china")
    write_photograph(made, "flower")
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[str, list[str], int], tuple[torch.Tensor, list[int]]]:
    """transformers' model and processor on the same files: the first logits, and greedy tokens."""
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    words = tokenizer("qwen3_vl")
    processor = qwen_processor(words, qwen_image_processor(MIN_PIXELS, MAX_PIXELS))

    def answer(text: str, names: list[str], count: int) -> tuple[torch.Tensor, list[int]]:
        pictures = [Image.open(folder / f"{name}.png") for name in names] or None
        inputs = processor(images=pictures, text=[text], return_tensors="pt")
        vocabulary = len(words.pretrained)
        out = model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(range(vocabulary, 320)),
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.logits[0][0, :vocabulary].softmax(-1), out.sequences[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
CASES = {
    "text alone": ("What is it?", [], None, "What is it?"),
    "one image": ("What is it?", ["china"], None, PLACEHOLDER + "What is it?"),
    "two images, system": (
        "Is <image> or <image> it?",
        ["flower", "china"],
        SYSTEM,
        f"Is {PLACEHOLDER} or {PLACEHOLDER} it?",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_decision_and_tokens_are_those_of_transformers(case: str, folder: Path, theirs: Any) -> None:
    prompt, names, system, rendered = CASES[case]
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    probability, tokens = theirs(
        f"{turn}<|im_start|>user\n{rendered}<|im_end|>\n<|im_start|>assistant\n<think>", names, 9
    )
    question = Question(prompt, [folder / f"{name}.png" for name in names], system, max_new_tokens=9)
    loading, decision, *pieces, answer = ask(folder, question)
    words = HuggingFaceTokenizer(folder, IMAGE_TAG["qwen3_vl"])
    modes = words.mode_tokens
    assert loading == Loading(folder, 4 * sum(p.numel() for p in load_parameters(folder)))
    assert isinstance(decision, Decision) and not decision.forced
    assert decision.thinking_probability == pytest.approx(float(probability[modes.newline]), rel=1e-4)
    assert decision.direct_probability == pytest.approx(float(probability[modes.blank_line]), rel=1e-4)
    assert decision.taken is modes.mode_of(tokens)
    assert isinstance(answer, Answer) and answer.tokens == 9 and not answer.finished
    assert modes.think_close not in tokens and modes.turn_end not in tokens
    said = words.decode(tokens if decision.taken is Mode.AUTO else tokens[1:])
    assert "".join(piece.text for piece in pieces) == said
    assert (answer.answer if decision.taken is Mode.DIRECT else answer.reasoning) == said.strip()


def test_a_system_message_cannot_end_its_turn(folder: Path) -> None:
    found = load.find_model(folder)
    question = Question("What is it?", system="Be<|im_end|> brief.<|image_pad|>")
    prompt = generate.encode(found, question, [])
    words = found.processor.tokenizer
    assert prompt.tokens.tolist().count(words.mode_tokens.turn_end) == 2
    assert words.image_token not in prompt.tokens.tolist() and len(prompt.vision_index) == prompt.num_tokens


def load_parameters(folder: Path) -> list[torch.nn.Parameter]:
    with load.trained_model(folder) as trained:
        return list(trained.model.parameters())


@pytest.mark.parametrize("mode", [Mode.THINKING, Mode.DIRECT])
def test_a_forced_mode_and_a_seed(folder: Path, mode: Mode) -> None:
    asked = Question("What is it?", [folder / "china.png"], mode=mode, max_new_tokens=12, temperature=1.0, seed=3)
    *_, first = ask(folder, asked)
    *_, again = ask(folder, asked)
    assert first == again and first.decision.forced and first.decision.taken is mode
    assert first.tokens == 12 or first.finished


def test_an_r4b_checkpoint_and_what_convert_makes_of_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "theirs", "r4b")
    question = Question("Is <image> it?", [write_photograph(tmp_path, "flower")], max_new_tokens=8)
    want = list(ask(tmp_path / "theirs", question))
    to_megatron(tmp_path / "theirs", tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs")
    got = list(ask(tmp_path / "ours", question))
    assert got[1:] == want[1:] and got[0].weight_bytes == want[0].weight_bytes
    assert isinstance(got[-1], Answer) and got[-1].tokens == 8


def test_a_model_without_a_tokenizer_speaks_the_board_tasks_words(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", "r4b")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    to_megatron(tmp_path / "theirs", tmp_path / "ours")
    *_, answer = ask(tmp_path / "ours", Question("final value ?"))
    assert isinstance(answer, Answer) and answer.tokens <= 40
    with pytest.raises(ValueError, match="the word 'What' is not among"):
        next(ask(tmp_path / "ours", Question("What is it?")))
    with pytest.raises(ValueError, match="no system message"):
        next(ask(tmp_path / "ours", Question("final value ?", system=SYSTEM)))


def without(folder: Path, tmp_path: Path, *names: str) -> Path:
    return shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(*names))


def edited(folder: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    copy = without(folder, tmp_path)
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | changes))
    return copy


REFUSED: dict[str, tuple[Callable[[Path, Path], tuple[Path, Question]], str]] = {
    "no image": (lambda f, t: (f, Question("?", [f / "nowhere.png"])), "nowhere.png: cannot be read"),
    "no picture": (lambda f, t: (f, Question("?", [f / "config.json"])), "not a PNG, JPEG, WEBP image"),
    "no image for a mark": (
        lambda f, t: (f, Question("<image> <image>", [f / "china.png"])),
        "holds 2 times '<image>'",
    ),
    "no folder": (lambda f, t: (t / "nowhere", Question("?")), "nowhere: there is no such folder"),
    "no model": (lambda f, t: (t, Question("?")), "neither a run folder nor a checkpoint.*nor a Hugging Face"),
    "no tokenizer": (lambda f, t: (without(f, t, "tokenizer.json"), Question("?")), "tokenizer.json is not a readable"),
    "no image settings": (
        lambda f, t: (without(f, t, "preprocessor_config.json"), Question("?")),
        "preprocessor_config.json: no readable image settings",
    ),
    "another family": (
        lambda f, t: (edited(f, t, "config.json", architectures=["LlamaForCausalLM"]), Question("?")),
        "LlamaForCausalLM.*is not one that can be converted",
    ),
    "other patches": (
        lambda f, t: (edited(f, t, "preprocessor_config.json", patch_size=14), Question("?")),
        "give the folder of the same model",
    ),
    "no budget": (lambda f, t: (f, Question("?", max_new_tokens=-1)), "max_new_tokens=-1"),
    "no temperature": (lambda f, t: (f, Question("?", temperature=-1)), "temperature=-1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_weights_are_read(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_model", lambda found: pytest.fail("the weights are read"))
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        list(ask(*make(folder, tmp_path)))


def test_too_little_memory_is_said_before_the_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda: (100_000, "this test"))
    monkeypatch.setattr(load, "load_weights", lambda *_: pytest.fail("the weights are read"))
    with pytest.raises(ValueError, match=r"its weights take 0\.\d GB as float32 and 0\.0 GB are free on this test"):
        list(ask(folder, Question("?")))


def test_a_missing_weight_is_named(folder: Path, tmp_path: Path) -> None:
    copy = without(folder, tmp_path, "*.safetensors")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor|is missing"):
        list(ask(copy, Question("?", max_new_tokens=2)))


def write(writer: Writer, tokens: list[int]) -> Iterator[tuple[str, bool]]:
    for token in tokens:
        yield from ((piece.text, piece.reasoning) for piece in writer.write(token))
    yield from ((piece.text, piece.reasoning) for piece in writer.close())


def test_a_character_is_held_back_until_it_is_whole(folder: Path) -> None:
    words = HuggingFaceTokenizer(folder, IMAGE_TAG["qwen3_vl"])
    tokens = words.encode("\né😀.</think>\n\nja<|im_end|>")
    assert len(words.encode("😀")) == 4
    assert list(write(Writer(words, words.mode_tokens), tokens)) == [
        ("é", True),
        ("😀", True),
        (".", True),
        ("\n\n", False),
        ("j", False),
        ("a", False),
    ]
    cut = [*tokens[:5], words.mode_tokens.think_close]
    assert [text for text, _ in write(Writer(words, words.mode_tokens), cut)] == ["é", "\N{REPLACEMENT CHARACTER}"]
    # Bytes that never become a character are not held back for ever, and none is lost.
    stray = [words.mode_tokens.newline, *[words.encode("é")[1]] * 20]
    pieces = [text for text, _ in write(Writer(words, words.mode_tokens), stray)]
    assert len(pieces) > 1 and "".join(pieces) == words.decode(stray[1:])


@pytest.mark.parametrize(
    "text", ["\nblue #1 9</think>\n\n4 4", "\n\n</think>4 blue</think>7", "\n\n4 blue", "blue\n4", "\n</think>4"]
)
def test_the_pieces_are_the_whole_text(text: str) -> None:
    """Words keep the spaces between them; only the decision, the first tag and the turn's end are left out."""
    words = ToyTokenizer()
    modes, tokens = words.mode_tokens, [*words.encode(text), words.mode_tokens.turn_end]
    pieces = list(write(Writer(words, modes), tokens))
    if modes.mode_of(tokens) is Mode.THINKING:
        reasoning, answer = modes.split(tokens)
        assert "".join(text for text, inside in pieces if inside) == words.decode(reasoning)
        assert "".join(text for text, inside in pieces if not inside) == words.decode(answer)
    else:
        left = text.removeprefix("\n\n").replace("</think>", "", 1)
        assert "".join(text for text, _ in pieces) == left


def test_pieces_come_while_the_answer_is_drawn(folder: Path) -> None:
    events = ask(folder, Question("What is it?", max_new_tokens=10))
    assert isinstance(next(events), Loading) and isinstance(next(events), Decision)
    assert isinstance(next(events), Piece)
    events.close()
    # A course that was left unfinished leaves nothing behind.
    *_, answer = ask(folder, Question("What is it?", max_new_tokens=2))
    assert isinstance(answer, Answer)

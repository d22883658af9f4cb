"""Ask a model a question about pictures, and hear the answer while it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from r4b_core.data.batch import PackedBatch
from r4b_core.data.chat import escape
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.images import open_image
from r4b_core.data.processing import PromptError
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import Tokenizer, ToyTokenizer
from r4b_core.evaluate.load import Found, Trained, find_model, open_model
from r4b_core.modes import NEWLINE, TURN_END, TURN_START, Mode, ModeTokens
from r4b_core.rollout.types import Request, SamplingParams

# What a Hugging Face folder, which has no recipe, may answer at most.
MAX_NEW_TOKENS = 2048
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes: what is still no character after so many tokens never becomes one.
_MOST_PENDING = 8


@dataclass(frozen=True)
class Question:
    """What is asked and how it is to be answered; ``max_new_tokens`` None: as many as the recipe's rollouts have."""

    prompt: str
    images: Sequence[Path] = ()
    system: str | None = None
    mode: Mode = Mode.AUTO
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Loading:
    """The weights are about to be read."""

    path: Path
    weight_bytes: int


@dataclass(frozen=True)
class Decision:
    """What the model would do by itself, and what it does: ``taken`` is AUTO where its first token is no decision."""

    thinking_probability: float
    direct_probability: float
    taken: Mode
    forced: bool


@dataclass(frozen=True)
class Piece:
    """Some text as it was drawn, either of the reasoning or of the answer."""

    text: str
    reasoning: bool


@dataclass(frozen=True)
class Answer:
    """All of a response. ``finished`` is False where the budget cut it."""

    decision: Decision
    reasoning: str
    answer: str
    tokens: int
    finished: bool

    def as_json(self) -> dict[str, Any]:
        flat = asdict(self)
        return {**flat.pop("decision"), **flat}


Event = Loading | Decision | Piece | Answer


def ask(folder: Path, question: Question) -> Iterator[Event]:
    """The course of one answer: Loading, Decision, Pieces as they are drawn, Answer.

    Everything that can be wrong with the question is found before the weights are read.

    Raises:
        ValueError: for images that cannot be opened safely or do not fit the prompt, a folder that is no model, words
            that its tokenizer does not know, settings out of range, or too little memory.
    """
    sampling = SamplingParams(question.max_new_tokens or 1, question.temperature, question.top_p)
    images = [open_image(path) for path in question.images]
    found = find_model(folder)
    prompt = encode(found, question, images)
    if question.max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=_default_budget(found))
    yield Loading(found.path, found.weight_bytes)
    with open_model(found) as trained:
        yield from _answer(trained, prompt, Request(0, question.mode, question.seed), sampling)


def _default_budget(found: Found) -> int:
    return MAX_NEW_TOKENS if found.from_hugging_face else found.recipe.bpo.max_new_tokens


def encode(found: Found, question: Question, images: Sequence[Any]) -> EncodedPrompt:
    """The prompt, with the system's turn in front.

    Raises:
        PromptError: if images and ``<image>`` marks do not match, or the board task is given a system message.
        ValueError: if the tokenizer does not know a word.
    """
    prompt = found.processor.encode_prompt(Sample("generate", "user", list(images), question.prompt, answer=""))
    if question.system is None:
        return prompt
    tokenizer = found.processor.tokenizer
    if isinstance(tokenizer, ToyTokenizer):
        raise PromptError("the board task knows no system message: leave it out")
    harmless, _ = escape(question.system, "system")
    turn = torch.tensor(tokenizer.encode(f"{TURN_START}system{NEWLINE}{harmless}{TURN_END}{NEWLINE}"))
    return replace(
        prompt,
        tokens=torch.cat([turn, prompt.tokens]),
        vision_index=torch.cat([torch.full_like(turn, PackedBatch.TEXT_INDEX), prompt.vision_index]),
    )


def _answer(trained: Trained, prompt: EncodedPrompt, request: Request, sampling: SamplingParams) -> Iterator[Event]:
    modes = trained.tokenizer.mode_tokens
    stream = trained.engine.stream(prompt, request, sampling)
    parts = {True: "", False: ""}
    writer = Writer(trained.tokenizer, modes)
    count = token = 0
    for count, token in enumerate(stream, 1):
        if count == 1:
            taken, forced = modes.mode_of([token]), request.mode is not Mode.AUTO
            decision = Decision(stream.thinking_probability, stream.direct_probability, taken, forced)
            yield decision
        for piece in writer.write(token):
            parts[piece.reasoning] += piece.text
            yield piece
    for piece in writer.close():
        parts[piece.reasoning] += piece.text
        yield piece
    yield Answer(decision, parts[True].strip(), parts[False].strip(), count, token == modes.turn_end)


class Writer:
    """Tokens of a response to text: tags are left out, and a character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, modes: ModeTokens) -> None:
        self.tokenizer, self.modes = tokenizer, modes
        self.reasoning: bool | None = None  # None before the decision
        self.closed = False
        # The tokens written last, which spaces between words depend on, and those held back.
        self.written: list[int] = []
        self.pending: list[int] = []

    def write(self, token: int) -> Iterator[Piece]:
        modes = self.modes
        if self.reasoning is None:
            decided = token in (modes.newline, modes.blank_line)
            self.reasoning = token != modes.blank_line
            if decided:
                return
        if token == modes.turn_end:
            return
        if token == modes.think_close and not self.closed:
            yield from self.close()
            self.reasoning, self.closed, self.written = False, True, []
            return
        self.pending.append(token)
        text = self._text()
        if not text.endswith(_REPLACEMENT) or len(self.pending) >= _MOST_PENDING:
            yield from self._flush(text)

    def close(self) -> Iterator[Piece]:
        """What is held back, whole or not."""
        if self.pending:
            yield from self._flush(self._text())

    def _text(self) -> str:
        before = self.tokenizer.decode(self.written) if self.written else ""
        return self.tokenizer.decode([*self.written, *self.pending])[len(before) :]

    def _flush(self, text: str) -> Iterator[Piece]:
        self.written, self.pending = self.pending, []
        if text:
            yield Piece(text, bool(self.reasoning))

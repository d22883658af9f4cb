"""Chat messages: read, made harmless, written as ChatML, and their image tokens put in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r4b_core.data.batch import PackedBatch
from r4b_core.data.processing import PromptError
from r4b_core.modes import IMAGE, NEWLINE, THINK_CLOSE, THINK_OPEN, TURN_END, TURN_START

ROLES = ("system", "user", "assistant")
# Only the first "<" is matched: a space after it makes any of these plain text.
_PLACEHOLDER = rf"\|\w+\|>|{IMAGE[1:]}|video>"
_WORKING = rf"{THINK_OPEN[1:]}|{THINK_CLOSE[1:]}|/?tool_(?:call|response)>"
_TAGS = {
    "user": re.compile(rf"<(?={_PLACEHOLDER}|{_WORKING})"),
    # An assistant has thought and called tools, and a system prompt may say how to.
    "system": re.compile(rf"<(?={_PLACEHOLDER})"),
    "assistant": re.compile(rf"<(?={_PLACEHOLDER})"),
}


class TextEncoder(Protocol):
    """What is asked of a tokenizer here: tags encode to one token each."""

    @property
    def image_token(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Message:
    """One turn. ``parts`` are texts in order, with None where the next image goes."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def num_images(self) -> int:
        return sum(part is None for part in self.parts)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, one placeholder per image; ``escaped`` tags of its writers were made plain text."""

    text: str
    num_images: int
    escaped: int


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in the common form: ``{"role": ..., "content": text or a list of parts}``.

    A part is ``{"type": "text", "text": ...}`` or ``{"type": "image"}``, whose image is passed on its own.

    Raises:
        PromptError: for an unknown role or part, a video, or an image inside its part.
    """
    read = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PromptError(f"message {number} has the role {role!r}: give one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise PromptError(f"message {number} has the content {content!r}: give a text or a list of parts")
        read.append(Message(role, tuple(_read_part(part, number) for part in content)))
    return read


def _read_part(part: Any, number: int) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image" and set(part) == {"type"}:
        return None
    if kind == "image":
        raise PromptError(f"message {number} holds an image in its part: leave it out there and pass it in `images`")
    if kind in ("video", "video_url"):
        raise PromptError(f"message {number} holds a video; video is not supported: give single frames as images")
    raise PromptError(f'message {number} holds the part {part!r}: give {{"type": "text"}} or {{"type": "image"}}')


def question_message(question: str, num_images: int, after_image: str = "") -> Message:
    """The user's turn of a question in which ``<image>`` marks where images go.

    Without a mark all images go in front, each followed by ``after_image``. Where there are no images, ``<image>`` is a
    word like any other.

    Raises:
        PromptError: if there are images and some, but not as many, marks: nobody can tell which are which.
    """
    marked = question.count(IMAGE)
    if not num_images:
        return Message("user", (question,))
    if not marked:
        return Message("user", (*(part for _ in range(num_images) for part in (None, after_image)), question))
    if marked != num_images:
        raise PromptError(
            f"question holds {marked} times {IMAGE!r} and the sample has {num_images} images: write it once per image "
            f"where the image goes, or nowhere; as plain text, write it without the angle brackets"
        )
    first, *others = question.split(IMAGE)
    return Message("user", (first, *(part for text in others for part in (None, text))))


def escape(text: str, role: str = "user") -> tuple[str, int]:
    """The text with a space in every tag of the chat template (``< image>``), and the number of these."""
    return _TAGS[role].subn("< ", text)


def render(messages: Sequence[Message], image: str) -> Rendered:
    """ChatML of a conversation up to the assistant's header and ``<think>``; ``image`` stands for each image.

    Raises:
        PromptError: if there is no message, the last is not the user's, or a system message is not the first.
    """
    if not messages or messages[-1].role != "user":
        raise PromptError("a prompt ends with the user's message: leave out what the assistant shall write")
    if any(message.role == "system" for message in messages[1:]):
        raise PromptError("a system message comes first and once: join them, or give the others to the user")
    escaped = 0
    turns = []
    for message in messages:
        texts: list[str] = [""]
        for part in message.parts:
            if part is None:
                texts.append("")
            else:
                texts[-1] += part
        # Neighbouring texts are joined before they are searched, so that no tag is put together from two.
        harmless = [escape(text, message.role) for text in texts]
        escaped += sum(count for _, count in harmless)
        content = image.join(text for text, _ in harmless)
        turns.append(f"{TURN_START}{message.role}{NEWLINE}{content}{TURN_END}{NEWLINE}")
    text = "".join(turns) + f"{TURN_START}assistant{NEWLINE}{THINK_OPEN}"
    return Rendered(text, sum(message.num_images for message in messages), escaped)


def place_images(tokenizer: TextEncoder, text: str, indices: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """(tokens, vision_index), int64 [n] each, of a text whose i-th image token is repeated for each of ``indices[i]``.

    Raises:
        PromptError: if the tokenizer finds another number of image tokens than there are images.
    """
    tokens = np.array(tokenizer.encode(text), dtype=np.int64)
    places = np.flatnonzero(tokens == tokenizer.image_token)
    if len(places) != len(indices):
        raise PromptError(f"the prompt holds {len(places)} image tokens and there are {len(indices)} images")
    repeats = np.ones(len(tokens), dtype=np.int64)
    repeats[places] = [len(index) for index in indices]
    starts = repeats.cumsum() - repeats
    vision_index = np.full(repeats.sum(), PackedBatch.TEXT_INDEX, dtype=np.int64)
    for start, index in zip(starts[places], indices, strict=True):
        vision_index[start : start + len(index)] = index
    return torch.from_numpy(tokens.repeat(repeats)), torch.from_numpy(vision_index)


def check_image_count(expected: int, given: int) -> None:
    """PromptError unless as many images are given as the messages have places for."""
    if expected != given:
        raise PromptError(f"the messages have places for {expected} images and {given} are given: give one for each")

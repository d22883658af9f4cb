"""What goes over the wire: the body of a chat completion, images as data URLs, and the reading of replies."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from PIL import Image
from pydantic import Field, field_validator

from r4b_core.config.load import fingerprint
from r4b_core.config.recipe import Settings
from r4b_core.curate.endpoints import CallSettings, EndpointSettings, Failure, TryFailed
from r4b_core.curate.templates import Template
from r4b_core.data.chat import escape, question_message
from r4b_core.data.images import IMAGE_FORMATS, open_image
from r4b_core.modes import BLANK_LINE, NEWLINE, THINK_CLOSE, THINK_OPEN

STOP = "stop"
_UPRIGHT, _EXIF_ORIENTATION = 1, 0x0112
_THINKING: dict[str, dict[str, bool | str]] = {
    "enable_thinking": {"on": True, "off": False},
    "thinking_mode": {"on": "long", "off": "short", "auto": "auto"},
}
_SEED = -7_777_777  # stands for the seed in the body that all requests share
_OURS = ("model", "messages", "seed", "stream", "stream_options", "temperature", "top_p", "top_k", "max_tokens")


class ServedModel(Settings):
    """A model behind one or several endpoints, and how it is asked."""

    model: str = Field(description="its name, as the server lists it")
    endpoints: list[EndpointSettings] = Field(default_factory=list, description="OpenAI-compatible servers of it")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="not sent where none")
    max_tokens: int = Field(16384, ge=1, description="of the response, reasoning included")
    thinking: Literal["default", "on", "off", "auto"] = Field("default", description="default sends no flag")
    thinking_flag: Literal["enable_thinking", "thinking_mode"] = Field(
        "enable_thinking", description="the chat template's switch: Qwen3's (true, false) or R-4B's (long, short, auto)"
    )
    system: str | None = Field(None, description="system message")
    image_side: int = Field(2048, ge=32, description="a longer image is scaled down")
    image_min_side: int = Field(32, ge=1, description="a narrower image is widened")
    jpeg_quality: int = Field(90, ge=1, le=100, description="of images that have to be encoded anew")
    extra: dict[str, Any] = Field(default_factory=dict, description="more fields of the request's body")
    calls: CallSettings = CallSettings()

    @field_validator("thinking", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("extra")
    @classmethod
    def _nothing_twice(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if twice := [name for name in _OURS if name in extra]:
            raise ValueError(f"{', '.join(twice)}: has a setting of its own")
        return extra

    def model_post_init(self, context: Any) -> None:
        if self.thinking == "auto" and self.thinking_flag == "enable_thinking":
            raise ValueError(
                "thinking = 'auto': enable_thinking knows on and off only; set thinking_flag: thinking_mode"
            )

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what is answered; the others decide where and how fast."""
        return self.model_dump(mode="json", exclude={"endpoints", "calls"})

    def fingerprint(self) -> str:
        """Changes with what is asked, not with where."""
        return fingerprint(self.content)

    def body(self, seed: int, messages: str) -> bytes:
        """The request's body; ``messages`` is JSON."""
        before, behind = self._around_seed
        return f'{before}{seed}{behind[:-1]}, "messages": {messages}}}'.encode()

    @cached_property
    def _around_seed(self) -> tuple[str, str]:
        """The body without messages, in front of the seed and behind it."""
        fields: dict[str, Any] = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p}
        if self.top_k is not None:
            fields["top_k"] = self.top_k
        fields |= {"max_tokens": self.max_tokens, "seed": _SEED, "stream": self.calls.stream}
        if self.calls.stream:
            fields["stream_options"] = {"include_usage": True}
        fields |= self.extra
        if self.thinking != "default":
            flag = {self.thinking_flag: _THINKING[self.thinking_flag][self.thinking]}
            fields["chat_template_kwargs"] = self.extra.get("chat_template_kwargs", {}) | flag
        before, _, behind = json.dumps(fields).partition(f'"seed": {_SEED}')
        return f'{before}"seed": ', behind


class Prompt:
    """One question in its template, with its images; made into messages when it is sent.

    Attributes:
        digest: 16 bytes that change with the template, the question or an image.
        lock: for whoever makes the messages in another thread.
    """

    def __init__(self, template: Template, question: str, images: Sequence[bytes]) -> None:
        self.template, self.question, self.images = template, question, images
        digest = hashlib.blake2b(template.mark + question.encode("utf-8", "replace"), digest_size=16)
        for image in images:
            digest.update(b"\0%d\0" % len(image))
            digest.update(image)
        self.digest = digest.digest()
        self.lock = asyncio.Lock()
        self._messages: str | None = None

    def messages(self, model: ServedModel) -> str:
        """The messages as JSON; tags of the chat template in the question are made plain text.

        Raises:
            ImageError: if an image cannot be opened safely.
            PromptError: if the question marks another number of images than there are.
        """
        if self._messages is None:
            messages: list[dict[str, Any]] = [{"role": "system", "content": model.system}] if model.system else []
            self._messages = json.dumps([*messages, {"role": "user", "content": self._content(model)}])
        return self._messages

    def _content(self, model: ServedModel) -> str | list[dict[str, Any]]:
        parts = list(question_message(self.question, len(self.images)).parts)
        leading = 0  # images in front of the question go in front of the instructions too
        while leading < len(parts) and not (parts[leading] or "").strip():
            leading += 1
        head = [part for part in parts[:leading] if part is None]
        texts = [None if part is None else escape(part)[0] for part in parts[leading:]] or [""]
        first, last = self.template.around
        whole: list[str | None] = [*head, first, *texts, last]
        if None not in whole:
            return "".join(part for part in whole if part is not None)
        content: list[dict[str, Any]] = []
        images = iter(self.images)
        for part in whole:
            if part is None:
                url = data_url(next(images), model.image_side, model.image_min_side, model.jpeg_quality)
                content.append({"type": "image_url", "image_url": {"url": url}})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += part
            elif part:
                content.append({"type": "text", "text": part})
        return content


def data_url(data: bytes, side: int, min_side: int, quality: int) -> str:
    """An image as a data URL: its own bytes where a server would see in them what training sees, else a new JPEG.

    A long side above ``side`` is scaled down, a short one below ``min_side`` is widened (MMFineReason's helper:
    2048, 32, quality 90); rotated, transparent, 16-bit or CMYK pictures are brought to plain RGB.

    Raises:
        ImageError: if it cannot be opened safely.
    """
    kind = _plain(data, side, min_side)
    if kind is None:
        picture = Image.fromarray(open_image(data))
        factor = min(1.0, side / max(picture.size))
        width, height = (max(min_side, round(length * factor)) for length in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        data, kind = file.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _plain(data: bytes, side: int, min_side: int) -> str | None:
    """The format of an image that can be sent as it is; the header alone is read."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        plain = (
            image.mode in ("RGB", "L", "P", "1")
            and max(image.size) <= side
            and min(image.size) >= min_side
            and not image.has_transparency_data
            and getattr(image, "n_frames", 1) == 1
            and _is_upright(image, data)
        )
    except Exception:  # whatever Pillow makes of a hostile header: open_image says what is wrong
        return None
    return str(image.format).lower() if plain and image.format in IMAGE_FORMATS else None


def _is_upright(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":  # its EXIF block may come last: to look for it, Pillow would decode the picture
        return b"eXIf" not in data
    return image.getexif().get(_EXIF_ORIENTATION, _UPRIGHT) == _UPRIGHT


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion as the server gave it."""

    content: str
    reasoning: str
    finish_reason: str
    tokens: int | None
    prompt_tokens: int | None

    def response(self, thinking: str) -> str:
        """The response from ``<think>`` on; a reasoning that the server split off is put back.

        A reply without tags keeps none, unless the flag that was sent says what it is.
        """
        if self.reasoning.strip():
            opened = f"{THINK_OPEN}{NEWLINE}{self.reasoning.strip()}"
            if self.finish_reason != STOP and not self.content.strip():
                return opened  # cut off while it still reasoned
            return f"{opened}{NEWLINE}{THINK_CLOSE}{BLANK_LINE}{self.content.lstrip()}"
        content = self.content.lstrip()
        if content.startswith(THINK_OPEN):
            return content
        # Templates that open the reasoning in the prompt leave the tag out of the reply.
        if THINK_CLOSE in content or (thinking == "on" and self.finish_reason != STOP):
            return f"{THINK_OPEN}{NEWLINE}{content}"
        if thinking == "off":
            return f"{THINK_OPEN}{BLANK_LINE}{THINK_CLOSE}{BLANK_LINE}{content}"
        return content


def read_completion(raw: bytes) -> Reply:
    """A reply to a request without ``stream``.

    Raises:
        TryFailed: if it is no chat completion.
    """
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        message = choice["message"]
        reply = _Collected()
        reply.add(message)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise TryFailed(Failure.NOT_JSON, f"no chat completion: {shorten(raw)}") from error
    return reply.finish(choice.get("finish_reason"), value.get("usage"))


class EventReader:
    """Puts a reply together from server-sent events.

    Attributes:
        done: the server said that this was all.
    """

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._reply = _Collected()
        self._finish: str | None = None
        self._usage: Any = None

    def feed(self, data: bytes) -> None:
        """Read some bytes.

        Raises:
            TryFailed: if they are no events of a chat completion, or tell of an error.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())
            elif line.strip() and line.split(b":")[0] not in (b"", b"event", b"id", b"retry"):
                raise TryFailed(Failure.NOT_JSON, f"no event stream: {shorten(line)}")

    def finish(self) -> Reply:
        """The whole reply.

        Raises:
            TryFailed: if the stream ended before its last event: the answer is partial then.
        """
        if self._finish is None:
            raise TryFailed(Failure.CONNECTION, "the stream ended before the answer did")
        return self._reply.finish(self._finish, self._usage)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            value = json.loads(data)
            if error := value.get("error"):
                raise TryFailed(Failure.SERVER_ERROR, shorten(json.dumps(error)))
            self._usage = value.get("usage") or self._usage
            for choice in value.get("choices") or ():
                self._reply.add(choice.get("delta") or {})
                self._finish = choice.get("finish_reason") or self._finish
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TryFailed(Failure.NOT_JSON, f"no chat completion: {shorten(data)}") from error


class _Collected:
    """The texts of a message, whole or in pieces."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []

    def add(self, message: dict[str, Any]) -> None:
        for texts, names in ((self.content, ("content",)), (self.reasoning, ("reasoning_content", "reasoning"))):
            text = next((message[name] for name in names if message.get(name)), "")
            if not isinstance(text, str):
                raise TypeError(f"{names[0]} is no text")
            texts.append(text)

    def finish(self, finish_reason: Any, usage: Any) -> Reply:
        counts = usage if isinstance(usage, dict) else {}
        tokens, prompt_tokens = (
            count if isinstance(count := counts.get(name), int) and 0 <= count < 2**62 else None
            for name in ("completion_tokens", "prompt_tokens")
        )
        content, reasoning = (_clean("".join(texts)) for texts in (self.content, self.reasoning))
        reason = finish_reason if isinstance(finish_reason, str) and finish_reason else "none"
        return Reply(content, reasoning, _clean(reason)[:40], tokens, prompt_tokens)


def server_words(raw: bytes, content_type: str) -> str:
    """What an error reply says, for people."""
    try:
        value = json.loads(raw)
        for _ in range(3):  # {"error": {"message": ...}} and its relatives
            value = (
                value.get("error") or value.get("message") or value.get("detail") if isinstance(value, dict) else value
            )
        return shorten(value if isinstance(value, str) and value else raw)
    except (ValueError, RecursionError):
        return f"{content_type or 'no content type'}: {shorten(raw)}"


def shorten(text: str | bytes, limit: int = 300) -> str:
    """One line of it, not much longer than ``limit``."""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    text = " ".join(_clean(text[: 4 * limit]).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _clean(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")

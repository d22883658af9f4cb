"""Prompt templates: plain text files with one ``{question}``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from r4b_core.modes import IMAGE

QUESTION = "{question}"
_FOLDER = Path(__file__).with_name("prompts")


@dataclass(frozen=True)
class Template:
    """What stands around a question.

    Attributes:
        name: of a template that ships, or a path.
        text: with `QUESTION` in it once, or not at all (a caption asks nothing of its own).
        digest: 16 hex digits of the text.
    """

    name: str
    text: str

    @cached_property
    def mark(self) -> bytes:
        """Two templates of different texts have different marks."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).digest()

    @property
    def digest(self) -> str:
        return self.mark.hex()[:16]

    @cached_property
    def around(self) -> tuple[str, str]:
        """What comes before and behind the question."""
        before, _, behind = self.text.partition(QUESTION)
        return before, behind


BARE = Template("bare", QUESTION)


def load_template(name: str, *, asks: bool = True) -> Template:
    """A template that ships with r4b, by its name, or a file of your own.

    Args:
        asks: it holds the question.

    Raises:
        ValueError: if there is none, or it does not hold ``{question}`` once.
    """
    if name == BARE.name:
        return BARE
    path = _FOLDER / f"{name}.txt" if "/" not in name and not name.endswith(".txt") else Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.txt")))
        raise ValueError(
            f"template = {name!r}: cannot be read ({error}); give a file, or one of {shipped}, bare"
        ) from None
    if text.count(QUESTION) != int(asks):
        wanted = "must stand in it exactly once" if asks else "must not stand in it"
        raise ValueError(f"template = {name!r}: {QUESTION} {wanted}, it does {text.count(QUESTION)} times")
    if IMAGE in text:
        raise ValueError(f"template = {name!r}: holds {IMAGE}; images go where the question has them, else in front")
    return Template(name, text)

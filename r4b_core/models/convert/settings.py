"""Reading a ``config.json`` that nobody vouches for: every problem is noted, and all are reported together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MISSING = object()


class ConversionError(ValueError):
    """A checkpoint that cannot be converted or loaded; says what is wrong with it, all at once."""


class Settings:
    """A section of ``config.json``; what is asked of it and refused is noted in ``problems``."""

    def __init__(self, values: Mapping[str, Any], where: str = "", problems: list[str] | None = None) -> None:
        self.values, self.where = values, where
        self.problems: list[str] = [] if problems is None else problems

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.values.get(key, otherwise)

    def refuse(self, reason: str) -> None:
        problem = f"{self.where}{reason}"
        if problem not in self.problems:
            self.problems.append(problem)

    def section(self, key: str) -> Settings:
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            self.refuse(f"{key} is {'missing' if value is None else 'not a table'}")
            value = {}
        return Settings(value, f"{self.where}{key}.", self.problems)

    def expect(self, key: str, *allowed: Any, otherwise: Any = _MISSING) -> None:
        """``key`` has one of the values that the model is built for; ``otherwise`` is what its absence means."""
        value = self.values.get(key, otherwise)
        if value is _MISSING:
            self.refuse(f"{key} is missing; the model is built for {_either(allowed)}")
        elif value not in allowed:
            self.refuse(f"{key} = {value!r}; the model is built for {_either(allowed)}")

    def size(self, key: str, otherwise: int, most: int = 1 << 20) -> int:
        value = self.values.get(key, otherwise)
        if type(value) is not int or not 1 <= value <= most:
            self.refuse(f"{key} = {value!r} is not a whole number from 1 to {most}")
            return otherwise
        return value

    def sizes(self, key: str, otherwise: list[int], least: int = 1) -> list[int]:
        value = self.values.get(key, otherwise)
        if not isinstance(value, list) or any(type(x) is not int or x < least for x in value):
            self.refuse(f"{key} = {value!r} is not a list of whole numbers of at least {least}")
            return otherwise
        return value

    def number(self, key: str, otherwise: float) -> float:
        value = self.values.get(key, otherwise)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            self.refuse(f"{key} = {value!r} is not a positive number")
            return otherwise
        return float(value)

    def rope(self) -> Settings:
        """Rotary settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
        found: dict[str, Any] = {key: self.values[key] for key in ("rope_theta",) if key in self.values}
        for key in ("rope_scaling", "rope_parameters"):
            value = self.values.get(key)
            if isinstance(value, Mapping):
                found |= value
            elif value is not None:
                self.refuse(f"{key} is not a table")
        rope = Settings(found, self.where, self.problems)
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            rope.refuse(f"rope_type = {kind!r}; the model is built for 'default'")
        return rope

    def divides(self, part: str, whole: str, parts: int, of: int) -> None:
        """Note it if ``of`` things do not share out over ``parts``."""
        if of % parts:
            self.refuse(f"{part} = {parts} does not divide {whole} = {of}")

    def tied(self) -> bool:
        """Is the head the embedding table? The top or the text section may say so; neither means no."""
        text = self.values.get("text_config")
        inner = text.get("tie_word_embeddings", False) if isinstance(text, Mapping) else False
        return bool(self.values.get("tie_word_embeddings", False) or inner)


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)

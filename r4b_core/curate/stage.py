"""What a stage of the data engine is: a pure function over a batch of records that accounts for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from r4b_core.data.records import Record


@dataclass(frozen=True, slots=True)
class Drop:
    """A record that a stage let go.

    Attributes:
        id, source: of the record; for a row that never became one, what could be read of it.
        reason: a short constant phrase to count by.
        detail: what exactly, for people.
        quarantined: True where the row itself was bad (unreadable, wrong types), False where a rule dropped it.
        file, row: where it came from.
    """

    id: str
    source: str
    reason: str
    detail: str = ""
    quarantined: bool = False
    file: str = ""
    row: int = -1


@dataclass(slots=True)
class Outcome:
    """What became of a batch: in = kept + dropped, always."""

    kept: list[Record] = field(default_factory=list)
    dropped: list[Drop] = field(default_factory=list)

    def drop(self, record: Record, reason: str, detail: str = "", *, quarantined: bool = False) -> None:
        """Let a record go."""
        self.dropped.append(Drop(record.id, record.source, reason, detail, quarantined))


class Stage(Protocol):
    """A stage by its name; calling it twice with the same records gives the same outcome."""

    name: str

    def __call__(self, records: Sequence[Record]) -> Outcome: ...

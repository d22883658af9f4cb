"""Quarantine: where records that cannot be used go, with the reason, so that nothing is dropped silently."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


class Quarantine:
    """Appends one JSON line {id, reason, detail} per record to ``quarantine.jsonl``.

    A record that the file already holds for the same reason (a resumed run meets its records again) is counted but not
    written twice. A last line cut short by a crash is cut off: its record will come again.

    Attributes:
        path: the file; it comes into being with the first record.
        counts: records by reason, those of the file included.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        self._known: set[tuple[str, str]] = set()
        if self.path.exists():
            self._read()

    def add(self, sample_id: str, reason: str, detail: str = "") -> None:
        """Write a record. ``reason`` is a short constant phrase to count by, ``detail`` says what exactly."""
        if (sample_id, reason) in self._known:
            return
        self._known.add((sample_id, reason))
        self.counts[reason] += 1
        line = json.dumps({"id": sample_id, "reason": reason, "detail": detail}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def __len__(self) -> int:
        return len(self._known)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                key = (str(record["id"]), str(record["reason"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is no quarantine record ({error}): move the file away"
                ) from error
            if key not in self._known:
                self._known.add(key)
                self.counts[key[1]] += 1

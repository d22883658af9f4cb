from __future__ import annotations

import json
from pathlib import Path

import pytest

from r4b_core.data.quarantine import Quarantine


def test_records_are_written_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    assert not path.exists()
    quarantine.add("a", "too long", "9 tokens")
    quarantine.add("b", "too long")
    quarantine.add("b", "no image", "naïve\nline")
    assert quarantine.counts == {"too long": 2, "no image": 1}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"id": "a", "reason": "too long", "detail": "9 tokens"}
    assert lines[2]["detail"] == "naïve\nline"


def test_a_resumed_run_writes_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a", "too long")
    resumed = Quarantine(path)
    resumed.add("a", "too long")
    resumed.add("c", "too long")
    assert resumed.counts == {"too long": 2}
    assert len(path.read_text().splitlines()) == len(resumed) == 2


def test_a_line_cut_by_a_crash_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a", "too long")
    path.write_text(path.read_text() + '{"id": "b", "rea')
    resumed = Quarantine(path)
    resumed.add("c", "too long")
    again = Quarantine(path)
    again.add("d", "too long")
    assert again.counts == {"too long": 3}
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c", "d"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('[1, 2]\n{"id": "a", "reason": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is no quarantine record"):
        Quarantine(path)

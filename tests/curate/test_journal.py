"""The journal: what is in it survives, what is not whole is not believed."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r4b_core.curate import journal as journal_module
from r4b_core.curate.journal import Journal, JournalError, encode_line, is_whole


def identity(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def fill(path: Path, entries: dict[int, dict[str, Any]], **settings: Any) -> None:
    async def write(journal: Journal) -> None:
        for number, entry in entries.items():
            await journal.append(identity(number), entry)

    with Journal(path, **settings) as journal:
        asyncio.run(write(journal))


def test_entries_come_back(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    entries = {number: {"text": "ä\n" * number * 1000, "n": number} for number in range(50)}
    fill(path, entries)
    with Journal(path) as journal:
        assert len(journal) == 50
        assert all(journal.get(identity(number)) == entry for number, entry in entries.items())
        assert journal.get(identity(50)) is None
        assert journal.get(identity(3)[:16] + "f" * 16) is None  # half of an id is not the id


def test_the_last_entry_of_an_id_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    fill(path, {1: {"text": "old"}})
    fill(path, {1: {"text": "new"}})
    with Journal(path) as journal:
        assert journal.get(identity(1)) == {"text": "new"}


@pytest.mark.parametrize("left", [0, 5, 8, 9, 30, 41, 42, 60])
def test_a_torn_only_line_is_cut_off(tmp_path: Path, left: int) -> None:
    path = tmp_path / "journal"
    path.write_bytes(encode_line(identity(1), {"text": "x" * 50})[:left])
    with Journal(path) as journal:
        assert journal.cut == left and len(journal) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 9, 20, 43, 60])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    fill(path, {number: {"text": "x" * 50} for number in range(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path) as journal:
        assert journal.cut == len(whole) // 3 - cut and len(journal) == 2
        assert journal.get(identity(2)) is None
    fill(path, {2: {"text": "x" * 50}})
    assert path.read_bytes() == whole


def test_a_damaged_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal"
    fill(path, {number: {"text": "x" * 50} for number in range(3)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with Journal(path) as journal:
        assert [journal.get(identity(number)) is None for number in range(3)] == [False, True, False]
        assert journal.damaged == 1
    assert "1 damaged lines" in caplog.text


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_pass_for_a_line(noise: bytes, at: int) -> None:
    line = encode_line(identity(1), {"text": "answer"})
    assert is_whole(line)
    assert not is_whole(noise) or noise == line
    spoilt = line[:at] + noise + line[at:]
    assert not is_whole(spoilt) or spoilt == line


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal"), pytest.raises(JournalError, match="another process"):
        Journal(tmp_path / "journal")


@pytest.mark.parametrize("text", ["a shopping list\nbread\n", "bread", "bread\nbutter", "deadbeef bread"])
def test_another_file_is_no_journal_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(JournalError, match="no journal"):
        Journal(path)
    assert path.read_text() == text


def test_a_full_disk_takes_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    fill(path, {1: {"text": "kept"}})
    before = path.read_bytes()
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) > 20:
            return real(handle, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    with pytest.raises(JournalError, match=r"No space left on device.*1 answers are safe"):
        fill(path, {2: {"text": "x"}}, room_wait_s=0.0)
    assert path.read_bytes() == before


def test_an_entry_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = os.write, iter([errno.ENOSPC, errno.EDQUOT])

    def nearly_full(handle: int, data: bytes) -> int:
        if refusal := next(refusals, None):
            raise OSError(refusal, os.strerror(refusal))
        return real(handle, data)

    monkeypatch.setattr(journal_module.os, "write", nearly_full)
    fill(tmp_path / "journal", {1: {"text": "x"}}, room_wait_s=0.05)
    with Journal(tmp_path / "journal") as journal:
        assert journal.get(identity(1)) == {"text": "x"}

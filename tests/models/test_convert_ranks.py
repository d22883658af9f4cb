"""Conversions under layouts of two ranks; see ranks_convert.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4B_TEST_SHARED", str(tmp_path))
    assert "passed" in run_ranks(Path(__file__).with_name("ranks_convert.py"), 2, timeout=240)

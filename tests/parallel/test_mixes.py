"""Mixes of layouts, recomputation and frozen parts, many cases in one launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks

CASES = Path(__file__).with_name("ranks_mixes.py")


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4B_TEST_SHARED", str(tmp_path))


def test_mixes_on_two_ranks() -> None:
    assert "11 passed" in run_ranks(CASES, 2)


@pytest.mark.slow
def test_mixes_on_four_ranks() -> None:
    assert "9 passed" in run_ranks(CASES, 4, timeout=1200)

"""Starts the multi-rank cases, many in one launch, since a launch costs seconds before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks

HERE = Path(__file__).parent


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4B_TEST_SHARED", str(tmp_path))


@pytest.mark.usefixtures("shared")
def test_two_ranks() -> None:
    assert "passed" in run_ranks(HERE / "ranks_two.py", 2, timeout=300)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_four_ranks() -> None:
    assert "passed" in run_ranks(HERE / "ranks_four.py", 4, timeout=300)


def test_a_failing_rank_is_reported_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nrank = os.environ['RANK']\nprint('rank', rank, 'speaks')\nsys.exit(int(rank))\n")
    with pytest.raises(AssertionError, match="rank 1 speaks"):
        run_ranks(script, 2, pytest=False, timeout=60)

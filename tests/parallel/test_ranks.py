"""Starts the multi-rank cases, many in one launch, since a launch costs seconds before its first step."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.parallel.launch import run_ranks

HERE = Path(__file__).parent


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4B_TEST_SHARED", str(tmp_path))


@pytest.mark.usefixtures("shared")
def test_two_ranks() -> None:
    assert "passed" in run_ranks(HERE / "ranks_two.py", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_four_ranks() -> None:
    assert "passed" in run_ranks(HERE / "ranks_four.py", 4)


def test_a_failing_rank_is_reported_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nrank = os.environ['RANK']\nprint('rank', rank, 'speaks')\nsys.exit(int(rank))\n")
    with pytest.raises(AssertionError, match="rank 1 speaks"):
        run_ranks(script, 2, pytest=False)


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match="no end after 12 s") as caught:
        run_ranks(script, 2, pytest=False, timeout=12)
    pids = [int(pid) for pid in re.findall(r"^pid (\d+)", str(caught.value), re.MULTILINE)]
    assert not any(psutil.pid_exists(pid) and "hangs.py" in " ".join(psutil.Process(pid).cmdline()) for pid in pids)

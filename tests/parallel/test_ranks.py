"""Starts the multi-rank cases, many in one launch, since a launch costs seconds before its first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.parallel.launch import end, run_ranks

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


def test_a_launcher_that_hangs_is_ended_with_its_ranks() -> None:
    rank = "import time; time.sleep(600)"
    script = (
        "import subprocess, sys, time\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)\n"
        "print(rank.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    end(launcher)
    assert launcher.returncode
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone or alive[0].status() == psutil.STATUS_ZOMBIE

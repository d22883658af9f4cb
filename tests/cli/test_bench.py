"""bench: the gate in front of a measurement, and the arithmetic of its table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from r4b_core.cli import bench
from r4b_core.cli.bench import Row, What, find_benchmarks, gate, read_rows, table


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one op `add`, its test and its benchmark, all committed."""
    files = {
        "benchmarks/kernels/add.py": "def test_add(benchmark):\n    benchmark(sum, [1, 2])\n",
        "benchmarks/kernels/_shared.py": "",
        "benchmarks/trainer/step.py": "",
        "benchmarks/trainer/rollout.py": "",
        "tests/kernels/test_add.py": "def test_add():\n    assert 1 + 1 == 2\n",
        "pytest.ini": "[pytest]\nmarkers = slow\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    return tmp_path


def test_finds_benchmarks_by_name(checkout: Path) -> None:
    assert [path.name for path in find_benchmarks(What.kernels, [])] == ["add.py"]
    assert [path.name for path in find_benchmarks(What.trainer, [])] == ["step.py"]
    assert [path.name for path in find_benchmarks(What.rollout, [])] == ["rollout.py"]
    with pytest.raises(ValueError, match="there is no ad; there are add"):
        find_benchmarks(What.kernels, ["ad"])


def test_gate_opens_for_committed_tests_that_pass(checkout: Path) -> None:
    assert gate("add", changed_tests=False) is None


def test_gate_stays_shut_for_changed_missing_and_failing_tests(checkout: Path) -> None:
    test = checkout / "tests/kernels/test_add.py"
    test.write_text("def test_add():\n    assert True\n")
    assert "differs from the last commit" in (gate("add", changed_tests=False) or "")
    assert gate("add", changed_tests=True) is None
    test.write_text("def test_add():\n    assert False\n")
    assert "its tests fail" in (gate("add", changed_tests=True) or "")
    assert "it has no tests/kernels/test_other.py" in (gate("other", changed_tests=False) or "")


def test_rows_prefer_device_time() -> None:
    report = {
        "benchmarks": [
            {"name": "a", "stats": {"median": 2e-3}, "extra_info": {"device_us": 10.0, "floor_us": 5.0}},
            {"name": "b", "stats": {"median": 2e-3}, "extra_info": {"rivals": {"torch": 4000.0}}},
        ]
    }
    assert read_rows(report) == [Row("a", 10.0, 5.0), Row("b", 2000.0, None, {"torch": 4000.0})]


def test_table_gives_the_ratios() -> None:
    made = table([Row("a", 10.0, 5.0, {"torch": 40.0}, {"flash-attn": "not installed"})])
    cells = [list(column.cells)[0] for column in made.columns]
    assert cells == ["a", "10.0", "5.0", "0.50", "torch 40.0 (4.00x), flash-attn: not installed"]

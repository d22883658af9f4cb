"""bench: the gate in front of a measurement, and the arithmetic of its table."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r4b_core.cli import bench
from r4b_core.cli.bench import Row, What, find_benchmarks, gate, read_rows, table
from r4b_core.cli.main import app


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one op `add`, its test and its benchmark, all committed."""
    files = {
        "benchmarks/kernels/add.py": "def test_add(benchmark):\n    benchmark(sum, [1, 2])\n",
        "benchmarks/kernels/_shared.py": "",
        "benchmarks/trainer/step.py": "",
        "benchmarks/rollout/engine.py": "",
        "benchmarks/data/images.py": "",
        "tests/kernels/test_add.py": "def test_add():\n    assert 1 + 1 == 2\n",
        "pytest.ini": "[pytest]\nmarkers =\n  slow\n  gpu\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # the pytest that is started must not take itself for a worker of ours
    return tmp_path


def test_finds_benchmarks_by_name(checkout: Path) -> None:
    assert [path.name for path in find_benchmarks(What.kernels, [])] == ["add.py"]
    assert [path.name for path in find_benchmarks(What.trainer, [])] == ["step.py"]
    assert [path.name for path in find_benchmarks(What.rollout, [])] == ["engine.py"]
    assert [path.name for path in find_benchmarks(What.data, [])] == ["images.py"]
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


def test_measures_and_appends_a_line_per_case(checkout: Path) -> None:
    path = checkout / "rows.jsonl"
    for _ in range(2):
        result = CliRunner().invoke(app, ["bench", "kernels", "add", "--json", str(path)])
        assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["test_add"] * 2
    assert rows[0]["seconds"] > 0 and rows[0]["environment"]["versions"]["torch"]
    assert any(line.startswith("test_add ") for line in result.output.splitlines())


def test_a_benchmark_that_fails_is_exit_1_with_its_output(checkout: Path) -> None:
    (checkout / "benchmarks/kernels/add.py").write_text(
        "def test_add(benchmark):\n    raise RuntimeError('broken so')\n"
    )
    result = CliRunner().invoke(app, ["bench", "kernels", "add"])
    assert result.exit_code == 1 and "broken so" in result.output


def test_rows_prefer_device_time_then_turns_then_the_median() -> None:
    def case(**extra: object) -> dict[str, object]:
        return {"name": "a", "stats": {"median": 3.0}, "extra_info": extra}

    report = {
        "benchmarks": [case(device_seconds=1.0, ours=2.0), case(ours=2.0, floor_seconds=0.5), case(rivals={"t": 6.0})]
    }
    assert read_rows(report) == [Row("a", 1.0), Row("a", 2.0, 0.5), Row("a", 3.0, None, {"t": 6.0})]


def test_the_rate_is_that_of_the_bound() -> None:
    extra = {"flops": 4e9, "bytes": 2e6, "ceiling": {"flops": 1e12, "bytes": 1e9}}
    case = {"name": "a", "stats": {"median": 1e-2}, "extra_info": extra}
    assert read_rows({"benchmarks": [case]})[0].rate == "0.4 TFLOP/s"
    extra["bytes"] = 8e6
    assert read_rows({"benchmarks": [case]})[0].rate == "0.0008 TB/s"


def test_table_gives_the_ratios() -> None:
    made = table([Row("a", 1e-5, 5e-6, {"torch": 4e-5}, {"flash-attn": "not installed"}, "2 TB/s")])
    cells = [list(column.cells)[0] for column in made.columns]
    assert cells == ["a", "10.0", "2 TB/s", "5.0", "0.50", "torch 40.0 (4.00x), flash-attn: not installed"]

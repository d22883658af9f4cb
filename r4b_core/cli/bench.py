"""`r4b bench`: measure kernels, trainer or rollouts, after their own tests have passed.

A benchmark is a pytest-benchmark case. What its clock does not know stands in ``extra_info``:

===============  =======================================================================================
``device_us``    median device time (CUDA events), microseconds; the host's median counts where it is absent
``floor_us``     the least time the hardware allows, from bytes and FLOPs, microseconds
``rivals``       name -> median microseconds of another way to compute the same
``skipped``      name -> why a rival was not measured
===============  =======================================================================================
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]


class What(StrEnum):
    kernels = "kernels"
    trainer = "trainer"
    rollout = "rollout"


@dataclass(frozen=True)
class Row:
    """One measured case. Times are microseconds."""

    name: str
    median: float
    floor: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def bench(
    what: Annotated[What, typer.Argument(help="What to measure.")] = What.kernels,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, such as rms_norm.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Keep pytest-benchmark's JSON here.")] = None,
    changed_tests: Annotated[
        bool, typer.Option("--changed-tests", help="Accept tests that differ from the last commit.")
    ] = False,
) -> None:
    """Measure against the floor and the rivals. A kernel is measured only if its committed tests pass."""
    from r4b_core.cli.output import console, say

    files = find_benchmarks(what, names or [])
    refused = []
    if what is What.kernels:
        for file in list(files):
            if reason := gate(file.stem, changed_tests):
                say(f"{file.stem}: not measured, {reason}")
                refused.append(file.stem)
                files.remove(file)
    if files:
        with tempfile.TemporaryDirectory() as scratch:
            path = output or Path(scratch, "benchmark.json")
            code = _pytest([*map(str, files), f"--benchmark-json={path}", "-q", "--benchmark-disable-gc"], show=True)
            if path.is_file() and (measured := read_rows(json.loads(path.read_text(encoding="utf-8") or "{}"))):
                console().print(table(measured))
        if code:
            refused.append("the benchmark run")
    if refused:
        raise typer.Exit(1)


def find_benchmarks(what: What, names: Sequence[str]) -> list[Path]:
    """The benchmark files to run.

    Raises:
        ValueError: outside a checkout, or a name that has no file; says which there are.
    """
    folder = ROOT / "benchmarks" / ("kernels" if what is What.kernels else "trainer")
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem[0] != "_" and path.stem != "conftest"}
    if what is not What.kernels:
        found = {name: path for name, path in found.items() if ("rollout" in name) == (what is What.rollout)}
    if not found:
        raise ValueError(f"bench {what}: no benchmarks in {folder}; they are in the repository, not in the package")
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"bench {what}: there is no {', '.join(unknown)}; there are {', '.join(found)}")
    return [found[name] for name in names] if names else list(found.values())


def gate(op: str, changed_tests: bool) -> str | None:
    """Why an op may not be measured: its tests are missing, differ from the commit, or fail. None where it may."""
    test = ROOT / "tests" / "kernels" / f"test_{op}.py"
    if not test.is_file():
        return f"it has no {test.relative_to(ROOT)}"
    if not changed_tests and _differs_from_commit(test):
        return f"{test.relative_to(ROOT)} differs from the last commit (--changed-tests accepts that)"
    if _pytest([str(test), "-q", "-x", "--benchmark-disable"], show=False):
        return f"its tests fail: pytest {test.relative_to(ROOT)}"
    return None


def _differs_from_commit(path: Path) -> bool:
    if not (ROOT / ".git").exists():
        return False
    done = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", str(path)], capture_output=True, text=True, check=True
    )
    return bool(done.stdout.strip())


def _pytest(arguments: list[str], *, show: bool) -> int:
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=None if show else subprocess.DEVNULL, check=False).returncode


def read_rows(report: dict[str, Any]) -> list[Row]:
    """The cases of a pytest-benchmark report."""
    rows = []
    for case in report.get("benchmarks", []):
        extra = case.get("extra_info", {})
        median = extra.get("device_us") or case["stats"]["median"] * 1e6
        rows.append(
            Row(case["name"], median, extra.get("floor_us"), extra.get("rivals") or {}, extra.get("skipped") or {})
        )
    return rows


def table(rows: Sequence[Row]) -> Any:
    """Median, share of the floor, and each rival's time over ours (above 1: we are faster)."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column("case", no_wrap=True)
    for column in ("median us", "floor us", "floor/median"):
        made.add_column(column, justify="right")
    made.add_column("rivals: us (rival/ours)")
    for row in rows:
        rivals = [f"{name} {time:.1f} ({time / row.median:.2f}x)" for name, time in row.rivals.items()]
        rivals += [f"{name}: {reason}" for name, reason in row.skipped.items()]
        made.add_row(
            escape(row.name),
            f"{row.median:.1f}",
            "-" if row.floor is None else f"{row.floor:.1f}",
            "-" if row.floor is None else f"{row.floor / row.median:.2f}",
            escape(", ".join(rivals)) or "-",
        )
    return made

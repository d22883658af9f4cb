"""`r4b bench`: measure kernels (after their own tests have passed), trainer, rollouts or data.

A benchmark is a pytest-benchmark case. What its clock does not know stands in ``extra_info``, all times in seconds:

==================  ====================================================================================
``device_seconds``  median device time (CUDA events); counts before the two below
``ours``            our time, taken in turns with the rivals; without it pytest-benchmark's median counts
``floor_seconds``   the least time the machine allows for the case's bytes and FLOPs
``flops, bytes``    the useful work, of which the rate is printed that the floor is bound by
``ideal``           name -> the ratio to a rival's time that the FLOPs saved would give
``ceiling``         {"flops", "bytes"} per second, the machine's own matmul and copy, measured in the same run
``rivals``          name -> time of another way to compute the same
``skipped``         name -> why a rival was not measured
==================  ====================================================================================
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
    data = "data"


@dataclass(frozen=True)
class Row:
    """One measured case. Times are seconds; ``rate`` is the useful rate, such as "412 TFLOP/s"."""

    name: str
    ours: float
    floor: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rate: str = "-"
    ideal: dict[str, float] = field(default_factory=dict)


def bench(
    what: Annotated[What, typer.Argument(help="What to measure.")] = What.kernels,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, such as rms_norm.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Append one JSON line per case here, with hardware and versions.")
    ] = None,
    changed_tests: Annotated[
        bool, typer.Option("--changed-tests", help="Accept tests that differ from the last commit.")
    ] = False,
) -> None:
    """Measure against the floor and the rivals. A kernel is measured only if its committed tests pass."""
    from r4b_core.cli.output import console, say

    failed = []
    reports = []
    for file in find_benchmarks(what, names or []):
        if what is What.kernels and (reason := gate(file.stem, changed_tests)):
            say(f"{file.stem}: not measured, {reason}")
            failed.append(file.stem)
            continue
        say(f"{file.stem}: measuring")
        report, log = measure(file)
        if log:
            say(log)
            failed.append(file.stem)
        reports.append(report)
    if rows := [row for report in reports for row in read_rows(report)]:
        console().print(table(rows))
    if output is not None:
        append_rows(output, what, reports)
    if failed:
        raise typer.Exit(1)


def find_benchmarks(what: What, names: Sequence[str]) -> list[Path]:
    """The benchmark files to run.

    Raises:
        ValueError: outside a checkout, or a name that has no file; says which there are.
    """
    folder = ROOT / "benchmarks" / what
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem[0] != "_" and path.stem != "conftest"}
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
    if _pytest(str(test), "-q", "-x", "--benchmark-disable").returncode:
        return f"its tests fail: pytest {test.relative_to(ROOT)}"
    on_gpu = ROOT / "tests" / "gpu"
    if _has_gpu() and on_gpu.is_dir() and _pytest(str(on_gpu), "-q", "-x", "-m", "gpu", "-k", op).returncode:
        return f"its tests on the GPU fail: pytest {on_gpu.relative_to(ROOT)} -m gpu -k {op}"
    return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _differs_from_commit(path: Path) -> bool:
    if not (ROOT / ".git").exists():
        return False
    done = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", str(path)], capture_output=True, text=True, check=True
    )
    return bool(done.stdout.strip())


def measure(file: Path) -> tuple[dict[str, Any], str]:
    """Run one benchmark file: pytest-benchmark's report, and pytest's output where it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "report.json")
        done = _pytest(str(file), "-q", "--benchmark-disable-gc", f"--benchmark-json={path}")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return json.loads(text or "{}"), done.stdout if done.returncode else ""


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def read_rows(report: dict[str, Any]) -> list[Row]:
    """The cases of a pytest-benchmark report."""
    return [_row(case) for case in report.get("benchmarks", [])]


def _row(case: dict[str, Any]) -> Row:
    extra = case.get("extra_info", {})
    ours = extra.get("device_seconds") or extra.get("ours") or case["stats"]["median"]
    rivals, skipped = extra.get("rivals") or {}, extra.get("skipped") or {}
    ideal = extra.get("ideal") or {}
    return Row(case["name"], ours, extra.get("floor_seconds"), rivals, skipped, _rate(extra, ours), ideal)


def _rate(extra: dict[str, Any], seconds: float) -> str:
    """FLOP/s where matrix products bound the case, else bytes/s."""
    if not (ceiling := extra.get("ceiling")):
        return "-"
    if extra["flops"] / ceiling["flops"] > extra["bytes"] / ceiling["bytes"]:
        return f"{extra['flops'] / seconds / 1e12:.3g} TFLOP/s"
    return f"{extra['bytes'] / seconds / 1e12:.3g} TB/s"


def append_rows(path: Path, what: What, reports: Sequence[dict[str, Any]]) -> None:
    """One JSON line per case: its numbers, and the hardware, versions, commit, date and command they are of."""
    from r4b_core.telemetry.environment import describe_environment

    environment = describe_environment() | {"command": " ".join(["r4b", *sys.argv[1:]])}
    with path.open("a", encoding="utf-8") as lines:
        for report in reports:
            for case in report.get("benchmarks", []):
                row = _row(case)
                lines.write(
                    json.dumps(
                        {"benchmark": what.value, "case": row.name, "seconds": row.ours}
                        | case.get("extra_info", {})
                        | {"environment": environment}
                    )
                    + "\n"
                )


def table(rows: Sequence[Row]) -> Any:
    """Our time, share of the floor reached, and each rival's time over ours (above 1: we are faster)."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column("case", no_wrap=True)
    for column in ("ours us", "rate", "floor us", "floor/ours"):
        made.add_column(column, justify="right")
    made.add_column("rivals: us (rival/ours)")
    for row in rows:
        rivals = [f"{name} {time * 1e6:.1f} ({_ratio(row, name)})" for name, time in row.rivals.items()]
        rivals += [f"{name}: {reason}" for name, reason in row.skipped.items()]
        made.add_row(
            escape(row.name),
            f"{row.ours * 1e6:.1f}",
            row.rate,
            "-" if row.floor is None else f"{row.floor * 1e6:.1f}",
            "-" if row.floor is None else f"{row.floor / row.ours:.2f}",
            escape(", ".join(rivals)) or "-",
        )
    return made


def _ratio(row: Row, rival: str) -> str:
    ratio = row.rivals[rival] / row.ours
    ideal = row.ideal.get(rival)
    return f"{ratio:.2f}x" + (f", {ratio / ideal:.2f} of the ideal {ideal:.2f}x" if ideal else "")

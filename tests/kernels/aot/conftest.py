"""Ahead-of-time compilation for sm_90a; no GPU is needed. The resources of every kernel are printed at the end.

    pytest tests/kernels/aot --resources benchmarks/results/resources-sm90a.md     also writes them as a table

Not together with the interpreter: under TRITON_INTERPRET=1, or without triton, nothing here is collected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

COLUMNS = ("case", "kernel", "warps", "registers", "shared", "hgmma", "hmma", "async_copies", "spills")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resources", type=Path, metavar="FILE", help="write the table of compiled kernels here")


@pytest.fixture
def recording(record_property: Callable[[str, Any], None]) -> Callable[[], contextlib.AbstractContextManager]:
    """``with recording() as kernels:`` compiles every launch inside; their resources end in ``kernels``."""
    from tests.kernels.aot import record

    @contextlib.contextmanager
    def run() -> Iterator[list[record.Resources]]:
        with record.recording() as kernels:
            yield kernels
        for kernel in kernels:
            record_property("kernel", asdict(kernel))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = []
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        case = report.nodeid.rpartition("/")[2].removeprefix("test_").replace(".py::test_", ": ")
        rows += [{"case": case} | value for name, value in report.user_properties if name == "kernel"]
    if not rows:
        return
    rows.sort(key=lambda row: row["case"])
    widths = {column: max(len(column), *(len(str(row[column])) for row in rows)) for column in COLUMNS}
    lines = [" | ".join(str(row[column]).ljust(widths[column]) for column in COLUMNS) for row in rows]
    header = " | ".join(column.ljust(widths[column]) for column in COLUMNS)
    terminalreporter.section("kernels compiled for sm_90a")
    for line in (header, *lines):
        terminalreporter.write_line(line)
    if (path := config.getoption("--resources", default=None)) is not None:
        rule = "|".join("-" * (width + 2) for width in widths.values())
        table = "\n".join(f"| {line} |" for line in lines)
        path.write_text(f"{_title()}\n\n| {header} |\n|{rule}|\n{table}\n", encoding="utf-8")


def _title() -> str:
    import triton

    return (
        f"# Kernels compiled for sm_90a by triton {triton.__version__}\n\n"
        "Written by `pytest tests/kernels/aot --resources FILE`. Compiled, not run: registers per thread, bytes of\n"
        "shared memory per block (232,448 at most), and instructions counted in the machine code."
    )

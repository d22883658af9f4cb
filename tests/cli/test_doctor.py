"""doctor: it runs anywhere, fails where something is missing, and knows every variable that the code reads."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r4b_core.cli.doctor import ENVIRONMENT
from r4b_core.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_names_every_op_with_its_backend() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    ops = {path.parent.name for path in (ROOT / "kernels" / "r4b_kernels").glob("*/reference.py")}
    chosen = set(re.findall(r"^\s*(\w+)\s+\w+\s+chosen", result.output, re.MULTILINE))
    assert ops <= chosen
    assert "gloo: available" in result.output


def test_a_missing_requirement_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = metadata.version

    def without_psutil(name: str) -> str:
        if name == "psutil":
            raise metadata.PackageNotFoundError(name)
        return "9.0" if name == "torch" else genuine(name)

    monkeypatch.setattr(metadata, "version", without_psutil)
    result = doctor()
    assert result.exit_code == 1
    assert "psutil not installed" in result.output
    assert re.search(r"torch 9\.0, needs <2\.14,>=2\.11", result.output)
    assert "missing: torch, psutil" in result.output


def test_checks_a_recipes_layout() -> None:
    assert "fits 2 rank(s): tp 2 x pp 1 x cp 1 x dp 1" in doctor("smoke", "parallel.tp=2", "--ranks", "2").output
    result = doctor("smoke", "parallel.tp=2", "--ranks", "3")
    assert result.exit_code == 2 and "needs a multiple of 2 ranks, there are 3" in result.stderr


def test_lists_every_environment_variable_that_is_read() -> None:
    """A variable that the code reads and doctor does not list would be a hidden one."""
    reads = re.compile(r"""(?:environ(?:\.\w+\(|\[)|getenv\()\s*["']([A-Z_0-9]+)["']""")
    found = {
        name
        for package in ("kernels/r4b_kernels", "r4b_core")
        for path in (ROOT / package).rglob("*.py")
        for name in reads.findall(path.read_text(encoding="utf-8"))
    }
    assert {"RANK", "WORLD_SIZE"} <= found
    assert found <= set(ENVIRONMENT)

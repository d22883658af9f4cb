"""Rollouts under every layout, many cases in one launch. R-4B's are held in tests/parallel/ranks_model.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks

CASES = Path(__file__).with_name("ranks_engine.py")


def test_qwen3_vl_on_two_ranks() -> None:
    assert "4 passed" in run_ranks(CASES, 2, timeout=200)


@pytest.mark.slow
def test_qwen3_vl_on_four_ranks() -> None:
    assert "2 passed" in run_ranks(CASES, 4, timeout=400)

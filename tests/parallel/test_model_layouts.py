"""The R-4B model under every layout, many cases in one launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run_python, run_ranks

CASES = Path(__file__).with_name("ranks_model.py")


def test_model_on_two_ranks() -> None:
    assert "8 passed" in run_ranks(CASES, 2)


@pytest.mark.slow
def test_model_on_four_ranks() -> None:
    assert "12 passed" in run_ranks(CASES, 4, timeout=1200)


def test_recipe_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4B_TEST_SHARED", str(tmp_path))
    alone = run_python(
        "import sys; from pathlib import Path; from r4b_core.config.load import load_recipe\n"
        "from r4b_core.stages.run import run_recipe\n"
        "from tests.parallel.ranks_recipe import OVERRIDES\n"
        "run_recipe(load_recipe('smoke', OVERRIDES), Path(sys.argv[1]))",
        str(tmp_path / "one"),
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert "6 passed" in run_ranks(Path(__file__).with_name("ranks_recipe.py"), 2)

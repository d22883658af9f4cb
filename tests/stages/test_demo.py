"""The demo's housekeeping: it replaces its own finished runs alone, and repeats none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from r4b_core.config.load import load_recipe
from r4b_core.stages import demo

CELL = {"accuracy": 0.5, "mean_tokens": 7.0, "thinking_rate": 0.25}
TABLE = {family: {mode: dict(CELL) for mode in ("direct", "thinking", "auto")} for family in ("easy", "hard")}
SUMMARY = {"before_bpo": TABLE, "after_bpo": TABLE, "seconds": {"bpo": 1.0}, "peak_rss_gb": 0.5}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Path]]:
    """Stands in for the training; (recipe, folder) of every run that was started."""
    runs: list[tuple[dict[str, Any], Path]] = []

    def run_recipe(resolved: Any, folder: Path) -> dict[str, Any]:
        runs.append((resolved.recipe.model_dump(mode="json"), folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(runs[-1][0], sort_keys=False))
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return SUMMARY

    monkeypatch.setattr(demo, "run_recipe", run_recipe)
    return runs


def printed(table: Any) -> str:
    console = Console(record=True, width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("content", ["notes.txt", "recipe.resolved.yaml"])
def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path, content: str, started: list[Any]) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / content).write_text("name: demonstration\nmodel:\n  name: demo\n")
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--run .*mine: holds something other than a demo run; name another folder"):
        demo.run_demo(run)
    assert {path.name for path in run.iterdir()} == {content, "summary.json"} and not started


def test_a_finished_demo_is_replaced_and_an_unfinished_one_goes_on(tmp_path: Path, started: list[Any]) -> None:
    run = tmp_path / "demo"
    for times in (1, 2):
        demo.run_demo(run)
        assert len(started) == times
        assert not (run / "old").exists()
        (run / "old").touch()
    (run / "summary.json").unlink()
    demo.run_demo(run)
    assert (run / "old").exists()


@pytest.mark.parametrize("make", [lambda run: None, lambda run: run.mkdir()])
def test_a_folder_that_is_absent_or_empty_will_do(tmp_path: Path, make: Any, started: list[Any]) -> None:
    make(tmp_path / "demo")
    assert demo.run_demo(tmp_path / "demo", seed=7) == SUMMARY
    assert started[0][0]["seed"] == 7


def test_a_finished_run_is_not_repeated(tmp_path: Path, started: list[Any]) -> None:
    assert demo.once(tmp_path / "run", ["seed=3"]) == SUMMARY
    assert demo.once(tmp_path / "run", ["seed=3"]) == SUMMARY
    assert len(started) == 1 and started[0][0]["seed"] == 3


def test_the_comparison_changes_the_freedom_of_the_rollouts_and_nothing_else(
    tmp_path: Path, started: list[Any]
) -> None:
    rows = demo.run_compare(tmp_path / "compare")
    seeds, starts = len(demo.COMPARE_SEEDS), len(demo.STARTS)
    assert len(rows) == seeds * starts * 2 and len(started) == seeds * (1 + starts * 2)
    for base in (recipe for recipe, folder in started if folder.name.endswith("annealed")):
        assert base["bpo"]["steps"] == 0 and base["anneal"]["steps"] > 0
    by_name = {folder.name: recipe for recipe, folder in started}
    for name, bpo in by_name.items():
        if not name.endswith("-bpo"):
            continue
        grpo = by_name[name.removesuffix("-bpo") + "-grpo"]
        assert (bpo["bpo"].pop("rollouts"), grpo["bpo"].pop("rollouts")) == ("both", "free")
        assert bpo == grpo
        assert bpo["model"]["init_from"].endswith(f"seed{bpo['seed']}-annealed")
        assert bpo["pretrain"]["steps"] == bpo["anneal"]["steps"] == 0
    assert demo.run_compare(tmp_path / "compare") == rows
    assert len(started) == seeds * (1 + starts * 2)
    assert len(json.loads((tmp_path / "compare" / "compare.json").read_text())) == len(rows)
    table = printed(demo.compare_table(rows))
    assert table.count("0.50 (0.50, 0.50, 0.50)") == starts * 2 * 2 and "thinking nearly dead" in table


def test_the_table_stands_before_and_after_side_by_side() -> None:
    table = printed(demo.summary_table(SUMMARY))
    assert table.count("0.500 /  7.0 / 0.25") == 2 * 3 * 2


def test_the_shipped_demo_asks_for_what_the_tables_show() -> None:
    recipe = load_recipe("demo").recipe
    assert recipe.name == "demo" and recipe.bpo.steps > 0 and recipe.evaluate.items >= 64

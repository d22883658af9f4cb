"""`r4b curate`: stages one by one and together, from the recipe to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r4b_core.cli.main import app
from r4b_core.curate import pipeline
from r4b_core.data.records import read_records

THOUGHT = "<think>\nhm\n</think>\nIt is <answer>%d</answer>."


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["curate", *arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """MMFineReason's rows, scored already: what is left to do is to clean, to verify and to select."""
    rows = [
        {
            "question": f"{i}. What is {i} plus {i}? (5 points)",
            "is_consistent": True,
            "answer": str(2 * i),
            "id": i,
            "source": "sums",
            "pass_rate": (i % 5) / 4,
            "qwen3vl_235b_thinking_response": THOUGHT % (2 * i + (i == 10)),
        }
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "mine.yaml").write_text(
        f"name: mine\nworkers: 0\ninputs: [{tmp_path}/rows.jsonl]\nstages: [standardize, verify, select]\n"
        "verify: {template: {min_words: 0}}\nselect: {preset: mmfr-123k}\n"
    )
    return str(tmp_path / "mine.yaml")


def test_all_stages_and_the_page(tmp_path: Path, recipe: str) -> None:
    folder = tmp_path / "run"
    result = run("run", recipe, "--run", str(folder))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "standardize: 21 in, 20 kept, 0 dropped, 1 quarantined" in lines
    assert "verify: 20 in, 19 kept, 1 dropped, 0 quarantined" in lines
    assert "select: 19 in, 3 kept, 16 dropped, 0 quarantined" in lines
    assert any(line.split() == ["quarantined", "1", "not", "JSON"] for line in lines)
    assert {path.name for path in folder.iterdir()} >= {"1-standardize", "3-verify", "5-select", "recipe.resolved.yaml"}
    kept = list(read_records(folder / "5-select" / "part-00000.parquet"))
    assert [(record.id, record.mode, record.verdict) for record in kept] == [
        (str(i), "thinking", "right") for i in (0, 5, 15)
    ]
    assert kept[0].question == "What is 0 plus 0?"
    assert Path(lines[-1].removeprefix("page: ")).is_file()
    again = run("select", recipe, "--run", str(folder))
    assert again.stdout.splitlines()[0] == "select: 19 in, 3 kept, 16 dropped, 0 quarantined"


def test_other_settings_are_refused_and_forced(tmp_path: Path, recipe: str) -> None:
    folder = str(tmp_path / "run")
    assert run("standardize", recipe, "--run", folder).exit_code == 0
    changed = ("standardize", recipe, "standardize.max_side=64", "--run", folder)
    result = run(*changed)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and "max_side was 2048, is 64: give --force" in result.stderr
    assert run(*changed, "--force").exit_code == 0


def test_a_stage_waits_for_the_one_before_it(tmp_path: Path, recipe: str) -> None:
    result = run("select", recipe, "--run", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "3-verify: holds no records; run the stage before this one first" in result.stderr


def test_a_stage_that_the_recipe_leaves_out_is_refused(tmp_path: Path, recipe: str) -> None:
    result = run("score", recipe, "--run", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "score is not among them: add it" in result.stderr


def test_ray_is_given_the_address(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def on_ray(store: Any, work: Any, address: str, advance: Any) -> None:
        asked.append((store.stage, address))
        pipeline.run_stage(store, work, 0, advance)

    monkeypatch.setattr(pipeline, "run_stage_on_ray", on_ray)
    assert run("run", recipe, "--run", str(tmp_path / "run"), "--ray", "head:6379").exit_code == 0
    assert asked == [(stage, "head:6379") for stage in ("clean", "standardize", "verify", "select")]


def test_stats_writes_the_page_again(tmp_path: Path, recipe: str) -> None:
    run("standardize", recipe, "--run", str(tmp_path / "run"))
    result = run("stats", str(tmp_path / "run"))
    assert result.exit_code == 0 and Path(result.stdout.strip()).is_file()


def test_show_says_where_each_value_comes_from() -> None:
    shown = CliRunner().invoke(app, ["curate", "show", "mmfr-123k", "--changed", "seed=3"]).output
    assert "mmfr-123k.yaml" in shown and "command line" in shown and "preset mmfr-123k" in shown
    assert "paper, section 3.3" in shown


@pytest.mark.parametrize("stages", ["[]", "[standardize,standardize]"])
def test_stages_that_make_no_sense_are_refused(recipe: str, stages: str) -> None:
    result = run("run", recipe, f"stages={stages}")
    assert result.exit_code == 2 and "at least one stage, and each once" in result.stderr


def test_models_that_nobody_serves_are_told_before_anything_runs(tmp_path: Path, recipe: str) -> None:
    folder = tmp_path / "run"
    result = run("run", recipe, "stages=[standardize,generate,score]", "--run", str(folder))
    assert result.exit_code == 2 and not folder.exists()
    for key in ("generate.teacher.endpoints", "score.student.endpoints"):
        assert f"{key} is empty" in result.stderr


def test_a_run_that_leaves_nothing_says_so(tmp_path: Path, recipe: str) -> None:
    result = run("run", recipe, "verify.template.min_words=100000", "--run", str(tmp_path / "run"))
    assert result.exit_code == 1 and "no record is left" in result.stdout
